"""Put a run together for this process: ranks, callbacks, what is printed first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from m3i_scale.config import RunConfig
from m3i_scale.errors import UserError
from m3i_scale.launch.lock import launch_of
from m3i_scale.output import wide_console
from m3i_scale.run.begin import train
from m3i_scale.run.callbacks.base import Callback
from m3i_scale.run.callbacks.metrics import MetricsWriter
from m3i_scale.run.check import make_plan
from m3i_scale.run.last_words import recorded
from m3i_scale.run.setup import Plan
from m3i_scale.run.trainer import Status
from m3i_scale.scale.checkpoint.layout import stopped_words
from m3i_scale.scale.deepspeed.resolve import explain_table
from m3i_scale.scale.deepspeed.rules import precision
from m3i_scale.scale.process_group import count_waits, start_ranks, stop_ranks

_CONSOLE = wide_console(stderr=True, soft_wrap=True)


def make_callbacks(run: RunConfig) -> list[Callback]:
    """What the run file asks for; metrics.jsonl always."""
    callbacks: list[Callback] = [MetricsWriter()]
    if run.log.progress:
        from m3i_scale.run.callbacks.progress import ProgressDisplay

        callbacks.append(ProgressDisplay(_CONSOLE))
    if run.log.tensorboard:
        from m3i_scale.run.callbacks.tensorboard import TensorBoardWriter

        callbacks.append(TensorBoardWriter())
    if run.log.wandb != "off":
        from m3i_scale.run.callbacks.wandb import WandbWriter

        callbacks.append(WandbWriter(run.log.wandb))
    return callbacks


def start(run: RunConfig) -> Status:
    """Join the other ranks and train."""
    torch.manual_seed(run.seed)
    with recorded(run.output_dir) as place:
        callbacks = make_callbacks(run)
        place.at("check")
        plan_of_run = check_first(run)
        place.at("join")
        ranks = start_ranks(run.timeouts.start_s, min(run.timeouts.join_s, run.timeouts.start_s), tell)
        clean = False
        try:
            with count_waits(place.waited) if place.read else contextlib.nullcontext():
                status = train(run, ranks, callbacks, announce, tell, place, plan_of_run)
            clean = True
        finally:
            stop_ranks(wait=clean)
    if status == "preempted" and ranks.rank == 0 and launch_of(run.output_dir) is None:  # else the launch says it
        tell(stopped_words(run.output_dir / "checkpoints"))
    return status


def check_first(run: RunConfig) -> Callable[[], Plan]:
    """Check the run before the ranks meet and before anything is built for them.

    Returns:
        What gives the plan, or raises its fault once the ranks have met: a host alone with a fault would leave the
        others waiting.

    Raises:
        UserError: what does not hold together, where all ranks are on this host and see the same.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        plan = make_plan(run, world)
    except Exception as error:  # raised when the ranks have met
        ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")  # torchrun, deepspeed
        if isinstance(error, UserError) and int(ranks_here) == world:
            raise
        fault = error
    else:
        return lambda: plan

    def raises() -> Plan:
        raise fault

    return raises


def announce(plan: Plan, resume_from: Path | None, notes: list[str]) -> None:
    """What will run, before it runs."""
    run, config = plan.run, plan.deepspeed.config
    _CONSOLE.print(explain_table(plan.deepspeed))
    for note in notes:
        _CONSOLE.print(f"[yellow]{note}[/]")
    origin = f"from {resume_from}" if resume_from else "from step 0"
    _CONSOLE.print(
        f"[bold]{run.name}[/]: recipe {plan.recipe.name}, ZeRO-{config['zero_optimization']['stage']} in "
        f"{precision(config)}, {run.optim.steps} steps of {run.optim.batch_size} samples "
        f"({run.optim.micro_batch_size} × {plan.accumulation} × {dist.get_world_size()}), {origin}, "
        f"into {run.output_dir}"
    )


def tell(text: str) -> None:
    """One line more."""
    _CONSOLE.print(text, markup=False, highlight=False)
