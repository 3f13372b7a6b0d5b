"""Collects what happened since the last logged step and reduces it over the ranks."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.objective.information import Objective
from m3i_scale.run.callbacks.base import StepRecord
from m3i_scale.scale.collectives import max_over_ranks, mean_over_ranks


class Meter:
    """One rank's running means. Figures stay on the device until a step is logged, so that no step waits for them."""

    def __init__(self, objective: Objective, total_steps: int, batch_size: int) -> None:
        self.objective = objective
        self.total_steps, self.batch_size = total_steps, batch_size
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0
        self._tokens = 0
        self._data_wait_s = 0.0
        self._started = time.perf_counter()

    def add_micro_batch(self, loss: Tensor, figures: dict[str, Tensor], tokens: int, data_wait_s: float) -> None:
        """After a forward pass; tokens are those that went through the backbone."""
        for name, value in {"loss": loss.detach(), **figures}.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.float()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._tokens += tokens
        self._data_wait_s += data_wait_s

    def add_gradients(self, scale: float) -> None:
        """After a backward pass: every group's gradient norm at the encoder output, `scale` times too large."""
        for name, squared in self.objective.squared_grad_norms.items():
            if squared:
                key = f"{name}/grad_norm"
                norm = torch.stack(squared).sum().sqrt() / scale
                self._sums[key] = self._sums.get(key, torch.zeros((), device=norm.device)) + norm
                self._counts[key] = self._counts.get(key, 0) + 1

    def end_step(self) -> None:
        """After an optimizer step."""
        self._steps += 1

    def record(
        self, *, step: int, lr: float, grad_norm: Any, momentum: float | None, quarantined: int, world_size: int
    ) -> StepRecord:
        """Means since the last record, over all ranks; every rank calls it."""
        means = mean_over_ranks({name: float(total) / self._counts[name] for name, total in self._sums.items()})
        steps = max(self._steps, 1)
        step_s = (time.perf_counter() - self._started) / steps
        sums = mean_over_ranks({"tokens": self._tokens / steps, "quarantined": float(quarantined)})
        peaks = max_over_ranks({"memory": _memory_gib(), "wait": self._data_wait_s / steps, "step_s": step_s})
        groups: dict[str, dict[str, float]] = {}
        for target in self.objective.recipe.targets:
            prefix = f"{target.name}/"
            groups[target.name] = {
                name.removeprefix(prefix): value for name, value in means.items() if name.startswith(prefix)
            }
        record = StepRecord(
            step=step,
            total_steps=self.total_steps,
            samples=step * self.batch_size,
            loss=means["loss"],
            lr=lr,
            grad_norm=None if grad_norm is None else float(grad_norm),
            groups=groups,
            information=sum(figures.get("nats", 0.0) for figures in groups.values()),
            health={name.removeprefix("health/"): v for name, v in means.items() if name.startswith("health/")},
            momentum=momentum,
            step_s=peaks["step_s"],
            data_wait_s=peaks["wait"],
            samples_per_s=self.batch_size / peaks["step_s"],
            tokens_per_s=sums["tokens"] * world_size / peaks["step_s"],
            quarantined=round(sums["quarantined"] * world_size),
            memory_gib=peaks["memory"],
        )
        self._reset()
        return record


def bad_groups(figures: dict[str, Tensor]) -> list[str]:
    """Names of the figures that are not finite."""
    return [name for name, value in figures.items() if not math.isfinite(float(value))]


def _memory_gib() -> float:
    """Peak of the accelerator's memory; of the process on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return float(accelerator.max_memory_allocated()) / 2**30
