"""The record of a logged step, and what it warns of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from m3i_scale.data.loader import TrainStream
from m3i_scale.run.callbacks.base import CallbackList
from m3i_scale.run.diagnosis import Diagnosis
from m3i_scale.run.guard import Guard
from m3i_scale.run.meter import Meter
from m3i_scale.run.supply import Shares
from m3i_scale.scale.loss_scale import loss_scale


@dataclass
class Records:
    """Gathers the figures of a step; all ranks call it, the callbacks of rank 0 hear of it."""

    engine: Any
    stream: TrainStream
    meter: Meter
    shares: Shares
    guard: Guard
    callbacks: CallbackList
    world_size: int
    _diagnosis: Diagnosis = field(default_factory=Diagnosis)

    def restart(self) -> None:
        """Forget what was seen: the run has gone back."""
        self.meter.reset()
        self.shares.start()
        self._diagnosis = Diagnosis()

    def write(self, step: int, *, lr: float, momentum: float | None, applied: bool) -> None:
        """The record of the step that has just ended.

        Args:
            step: of the run.
            lr: learning rate.
            momentum: of the average; None without one.
            applied: whether the optimizer has taken the step.
        """
        scale = loss_scale(self.engine)
        record = self.meter.record(
            step=step,
            lr=lr,
            grad_norm=self.engine.get_global_grad_norm() if applied else None,
            momentum=momentum,
            quarantined=sum(self.stream.quarantined.values()),
            quarantined_samples=sum(self.stream.quarantined_samples.values()),
            world_size=self.world_size,
            loss_scale=scale,
            skipped_steps=None if scale is None else int(self.engine.skipped_steps),
            skipped_nonfinite=self.guard.skipped,
            sources=self.shares.record(),
        )
        self.guard.remember(record)
        self.callbacks.on_step(record)
        for fault in self._diagnosis.check(record):
            self.callbacks.on_warning(step, asdict(fault))
