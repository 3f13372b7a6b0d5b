"""Learning-rate schedules after the warm-up: `optim.schedule` of a config file."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

from pydantic import Field, field_validator
from typing_extensions import Self

from m3i_scale.config.kinds import Kind


class Schedule(Kind):
    """Learning-rate schedule as a fraction of `lr − min_lr` per step, before the warm-up is applied."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}

    @abstractmethod
    def share(self, step: int, *, steps: int, warmup_steps: int) -> float:
        """Return the fraction at a step, at most 1. `step` counts from 0."""

    def fitted(self, steps: int, to: int) -> Self:
        """Return the schedule of a run of `steps` steps, rescaled to `to` steps."""
        return self


class Cosine(Schedule):
    """Half-cosine schedule from the end of the warm-up to 0 at the last step."""

    kind: ClassVar[str] = "cosine"

    def share(self, step: int, *, steps: int, warmup_steps: int) -> float:
        progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
        return (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


class Poly(Schedule):
    """Polynomial schedule over all steps, including the warm-up; used for segmentation (mmcv)."""

    kind: ClassVar[str] = "poly"
    power: float = Field(default=1.0, gt=0)
    """Exponent of 1 − step / steps."""

    def share(self, step: int, *, steps: int, warmup_steps: int) -> float:
        return float((1 - step / steps) ** self.power)


class MultiStep(Schedule):
    """Step schedule that multiplies by `gamma` at every milestone; used for detection (detectron2)."""

    kind: ClassVar[str] = "multi_step"
    milestones: tuple[int, ...]
    """Steps in ascending order at which the learning rate drops."""
    gamma: float = Field(default=0.1, gt=0, lt=1)
    """Factor of the learning rate at every milestone."""

    @field_validator("milestones")
    @classmethod
    def _ascends(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if not milestones or list(milestones) != sorted(set(milestones)) or milestones[0] < 1:
            raise ValueError("milestones are steps in ascending order, from 1 on")
        return milestones

    def share(self, step: int, *, steps: int, warmup_steps: int) -> float:
        return self.gamma ** sum(milestone <= step for milestone in self.milestones)

    def fitted(self, steps: int, to: int) -> Self:
        """Return a schedule with milestones at the same fractions of the run. Short runs can have fewer milestones."""
        nearest = {min(round(milestone * to / steps), to - 1) for milestone in self.milestones}
        milestones = tuple(sorted(nearest - {0}))
        return self.model_copy(update={"milestones": milestones}) if milestones else self
