"""What a planned run costs beside its steps: checkpoints, failures, money."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m3i_scale.config import RunConfig
from m3i_scale.errors import ConfigError
from m3i_scale.run.planning import GIB, Estimate, Machine, Model
from m3i_scale.scale.plan.counts import numel_of
from m3i_scale.scale.plan.failures import best_interval, lost_share
from m3i_scale.scale.plan.settings import Settings

RESTART_S = 300.0
"""From a failure to the next step: noticing it, a place to run, imports, the checkpoint. An assumption."""
AVERAGE_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """What is known of storage, failures and prices; None for what is not."""

    mtbf_hours: float | None = None
    """Mean time between failures of one node."""
    save_s: float | None = None
    """For which a save holds the run up."""
    storage_gb_s: float | None = None
    """What all ranks together write."""
    restart_s: float | None = None
    dollars_per_gpu_hour: float | None = None

    def check(self, run: RunConfig) -> None:
        """Refuse what has no effect, and what is missing.

        Raises:
            ConfigError: either.
        """
        if self.mtbf_hours is None:
            for option, value in (("--save-s", self.save_s), ("--restart-s", self.restart_s)):
                if value is not None:
                    raise ConfigError(f"{option} has no effect without --mtbf-hours", fix="--mtbf-hours 5000")
        elif self.save_s is None and (run.checkpoint.background or self.storage_gb_s is None):
            raise ConfigError(
                "--mtbf-hours needs --save-s: for how long a save holds the run up",
                why="in the background that is the copy into host memory, else the whole save",
                fix="--save-s 2, or checkpoint.background=false with --storage-gb-s",
            )


UNKNOWN = Costs()


def checkpoint_bytes(model: Model, found: Estimate) -> int:
    """Tensors of one checkpoint under an estimated choice."""
    return tensor_bytes(model, found.settings)


def tensor_bytes(model: Model, settings: Settings) -> int:
    """Tensors of one checkpoint: master weights, moments, fp32 averages, buffers."""
    trained = numel_of(model.parameters, "trained") * (settings.master_bytes + 2 * settings.state_bytes)
    return trained + numel_of(model.parameters, "momentum") * AVERAGE_BYTES + model.remembered_bytes


def costs_of(
    run: RunConfig, model: Model, machine: Machine, found: Estimate, costs: Costs, seconds: float
) -> dict[str, Any]:
    """The part of the plan's document about them.

    Args:
        run: the run file.
        model: of the run.
        machine: where it runs.
        found: the estimate of a step.
        costs: see `Costs.check`.
        seconds: of all steps, without failures and saves.

    Returns:
        {checkpoint: {gib, write_s}, failures: {…} or None, dollars: … or None}
    """
    size = checkpoint_bytes(model, found)
    write_s = size / (costs.storage_gb_s * 1e9) if costs.storage_gb_s else None
    failures = None if costs.mtbf_hours is None else _failures(run, machine, found, costs, seconds, write_s)
    hours = seconds / 3600 * machine.links.world if failures is None else failures["gpu_hours"]
    dollars = None
    if costs.dollars_per_gpu_hour is not None and hours is not None:
        dollars = hours * costs.dollars_per_gpu_hour
    return {"checkpoint": {"gib": size / GIB, "write_s": write_s}, "failures": failures, "dollars": dollars}


def _failures(
    run: RunConfig, machine: Machine, found: Estimate, costs: Costs, seconds: float, write_s: float | None
) -> dict[str, Any]:
    background = run.checkpoint.background
    stall_s = costs.save_s if costs.save_s is not None else float(write_s or 0)
    job_s = float(costs.mtbf_hours or 0) * 3600 / machine.links.nodes
    behind_s = float(write_s or 0) if background else 0.0
    restart_s = RESTART_S if costs.restart_s is None else costs.restart_s

    def lost(interval_s: float) -> float:
        held_s = stall_s + max(0.0, behind_s - interval_s)  # a save waits until the last one is written
        return lost_share(interval_s, stall_s=held_s, between_failures_s=job_s, restart_s=restart_s, behind_s=behind_s)

    best_s = best_interval(stall_s, job_s, least_s=behind_s)
    steps = max(1, round(best_s / found.step_s))
    share = lost(steps * found.step_s)
    every = run.checkpoint.every_steps
    return {
        "mtbf_hours_node": costs.mtbf_hours,
        "mtbf_hours_job": job_s / 3600,
        "stall_s": stall_s,
        "restart_s": restart_s,
        "every_steps": steps,
        "interval_s": steps * found.step_s,
        "lost_share": share,
        "own_every_steps": every,
        "own_lost_share": lost(every * found.step_s),
        "days": seconds / 86400 / (1 - share) if share < 1 else None,
        "gpu_hours": seconds / 3600 * machine.links.world / (1 - share) if share < 1 else None,
    }
