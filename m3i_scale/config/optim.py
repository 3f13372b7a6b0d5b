"""Config sections `optim` and `stages`: AdamW, batch sizes, learning-rate schedules, and stages of a run."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from m3i_scale.config.sections import MAX_BATCH, MAX_SIDE, FixableError, Kind, Section, is_stored

Share = Annotated[float, Field(ge=0, lt=1)]


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


class OptimConfig(Section):
    """Settings of the AdamW optimizer, gradient clipping and the learning-rate schedule."""

    batch_size: int = Field(default=4096, ge=1, le=MAX_BATCH)
    """Global batch size: samples per optimizer step over all ranks."""
    micro_batch_size: int = Field(default=32, ge=1, le=MAX_BATCH)
    """Per-device batch size. batch_size = micro_batch_size × gradient accumulation steps × ranks."""
    contrastive_batch: Literal["micro", "global"] = "micro"
    """Samples that losses compare: those of one micro-batch over all ranks, or of all gradient accumulation steps.
    global: negatives and batch statistics of `batch_size` samples, for one more forward pass per step (GradCache)."""
    steps: int = Field(default=100_000, ge=1)
    """Number of optimizer steps of the run."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate. It is used unchanged: no scaling rule is applied."""
    min_lr: float = Field(default=0.0, ge=0)
    """Final learning rate of the schedule."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Layer-wise learning-rate decay: each backbone layer's learning rate is this factor times the next layer's.
    Decoders, heads and text encoder use the full rate. For recipes only; tasks use `task.layer_decay`."""
    schedule: Schedule = Field(default_factory=Cosine)
    """Learning-rate schedule. cosine (after the warm-up), {kind: poly, power: 1.0} (mmcv, over all steps), or
    {kind: multi_step, milestones: [8000, 9000], gamma: 0.1}."""
    warmup_steps: int = Field(default=2_500, ge=0)
    """Steps of linear warm-up. Default: 2,500, or a tenth of `steps` for runs of at most 2,500 steps."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay of matrices. Biases, norms and other vectors are not decayed."""
    decay_tokens: bool = False
    """Apply weight decay to class, mask and register tokens and to trained position embeddings too, as timm and MAE."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of AdamW's first and second moment (β₁, β₂)."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's ε, added to the square root of the second moment."""
    momentum_correction: bool = True
    """Adam bias correction of the first moment: divide it by 1 − β₁ᵗ in step t. false: multiply the learning rate by
    that factor, which undoes the correction. Together with an eps far above the second moment, false
    gives SGD with momentum (docs/guides/fine-tune-classification.md)."""
    trust_coefficient: float | None = Field(default=None, gt=0, le=1)
    """LARS: multiply the gradient of each matrix by this × ‖weights‖ / ‖gradient‖. Default: off. Needs SGD with
    momentum (see `momentum_correction`), no weight decay, and ZeRO stage 1 or 2 without offload."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Maximum global gradient norm. 0 disables clipping."""

    def compared_samples(self, ranks: int) -> int:
        """Return the global contrastive batch: the number of samples that losses compare."""
        return self.batch_size if self.contrastive_batch == "global" else self.micro_batch_size * ranks

    @model_validator(mode="before")
    @classmethod
    def _fill_in_warmup(cls, values: Any) -> Any:
        """Default to a shorter warm-up in short runs, so that setting `steps` alone is enough."""
        if not isinstance(values, dict) or "warmup_steps" in values:
            return values
        try:
            steps = int(values["steps"])
        except (KeyError, TypeError, ValueError, OverflowError):  # `steps` itself is reported by its field
            return values
        if steps > cls.model_fields["warmup_steps"].default:
            return values
        return {**values, "warmup_steps": max(steps // 10, 0)}

    # Rules about two fields belong to the later field: a model validator would only run if all fields were valid.
    @field_validator("warmup_steps")
    @classmethod
    def _warms_up_within_the_run(cls, warmup_steps: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps is not None and warmup_steps >= steps:
            raise FixableError(
                f"warmup_steps ({warmup_steps}) must be less than steps ({steps})",
                f"optim.warmup_steps={steps // 10}",
                "steps",
            )
        return warmup_steps

    @field_validator("schedule")
    @classmethod
    def _falls_within_the_run(cls, schedule: Schedule, info: ValidationInfo) -> Schedule:
        steps = info.data.get("steps")
        if steps is not None and isinstance(schedule, MultiStep) and schedule.milestones[-1] >= steps:
            raise FixableError(
                f"the milestone {schedule.milestones[-1]} has no effect: the run has {steps} steps",
                f"optim.schedule.milestones below {steps}",
                "steps",
            )
        return schedule

    @field_validator("trust_coefficient")
    @classmethod
    def _scales_sgd(cls, trust_coefficient: float | None, info: ValidationInfo) -> float | None:
        given = info.data
        if trust_coefficient is None or not {"eps", "momentum_correction", "weight_decay"} <= given.keys():
            return trust_coefficient
        if given["momentum_correction"] or given["eps"] < 1:
            raise FixableError(
                "trust_coefficient needs SGD with momentum: AdamW divides each gradient by its magnitude",
                "optim.momentum_correction=false optim.eps=1e6, and optim.lr = the rate of SGD × 1e6 / (1 − betas[0])",
            )
        if given["weight_decay"]:
            raise FixableError(
                f"trust_coefficient does not support weight decay, got weight_decay {given['weight_decay']:g}",
                "optim.weight_decay=0",
                "weight_decay",
            )
        return trust_coefficient

    @field_validator("min_lr")
    @classmethod
    def _rate_falls(cls, min_lr: float, info: ValidationInfo) -> float:
        lr = info.data.get("lr")
        if lr is not None and min_lr > lr and not is_stored(info):
            raise FixableError(
                f"min_lr ({min_lr:g}) is above lr ({lr:g}): the rate would rise to the end",
                f"optim.min_lr={lr / 100:g}, or 0, the default",
                "lr",
            )
        return min_lr


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Return the learning rate: the schedule between `lr` and `min_lr`, with linear warm-up. Without Adam bias
    correction it is scaled by 1 − β₁ᵗ. `step` counts from 0."""
    share = optim.schedule.share(step, steps=optim.steps, warmup_steps=optim.warmup_steps)
    rate = optim.min_lr + (optim.lr - optim.min_lr) * share if share < 1 else optim.lr
    if not optim.momentum_correction:
        rate *= 1 - optim.betas[0] ** (step + 1)
    return rate * (step + 1) / optim.warmup_steps if step < optim.warmup_steps else rate


class Stage(Section):
    """One stage of a run. Omitted fields keep their value from the rest of the config file."""

    steps: int = Field(ge=1)
    """Number of steps of this stage. All stages together must have `optim.steps`."""
    image_size: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    """Image size in pixels. Default: the backbone's. Position embeddings are interpolated to any other size."""
    micro_batch_size: int | None = Field(default=None, ge=1, le=MAX_BATCH)
    """Samples per rank in one forward pass. Default: optim.micro_batch_size. optim.batch_size does not change."""
