"""Task `classification`: a linear classifier on the features of the backbone, or many in one pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config import RunConfig
from m3i_scale.config.sections import MAX_LAYERS, FixableError, Section
from m3i_scale.data.shards import LABELS
from m3i_scale.errors import ConfigError
from m3i_scale.tasks.backbone_task import BackboneTask

if TYPE_CHECKING:
    from m3i_scale.backbones.families import Family, VisionConfig
    from m3i_scale.data.batch import Batch
    from m3i_scale.objective.information import Objective
    from m3i_scale.tasks.classification.timm_augmentation import LabelMixing


class Sweep(Section):
    """Grid of linear heads over input features and learning rates, trained independently in one pass. The best head on
    data.validation is exported."""

    blocks: tuple[int, ...] = (1, 4)
    """Numbers of last layers whose class tokens are concatenated, each normalized by the backbone's final norm."""
    mean: tuple[bool, ...] = (False, True)
    """Inputs without (false) and with (true) the mean patch token of the last layer appended."""
    lr_scales: tuple[float, ...] = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
    """Learning rates as fractions of optim.lr."""

    @model_validator(mode="after")
    def _differ(self) -> Self:
        for name, values in self:
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} are several choices, each once: {list(values)}")
        if not all(1 <= blocks <= MAX_LAYERS for blocks in self.blocks):
            raise ValueError(f"blocks must be numbers of layers, from 1 to {MAX_LAYERS:,}: {[*self.blocks]}")
        if not 0 < min(self.lr_scales) <= max(self.lr_scales) <= 1:
            raise ValueError("lr_scales are shares of optim.lr: above 0, and 1 at most")
        return self

    def decoders(self) -> dict[str, dict[str, Any]]:
        """Return the head inputs by name, as decoders of a recipe."""
        return {
            f"last{blocks}{'_mean' if mean else ''}": {"kind": "class_token", "blocks": blocks, "mean": mean}
            for blocks in self.blocks
            for mean in self.mean
        }

    def heads(self) -> dict[str, tuple[str, float]]:
        """Return the decoder and learning-rate fraction of each head, by head name."""
        return {
            f"{decoder}_lr{scale:g}".replace(".", "_"): (decoder, scale)
            for decoder in self.decoders()
            for scale in self.lr_scales
        }


class Classification(BackboneTask):
    """Image classification task."""

    kind: ClassVar[str] = "classification"
    model: ClassVar[str] = "classifier"
    labels_file: ClassVar[str] = LABELS
    metrics: ClassVar[dict[str, str]] = {"top_1": "top-1"}
    exportable: ClassVar[dict[str, tuple[str, ...]]] = {"pool": ("class_token", "mean_pool")}
    pool: Literal["class_token", "mean_pool", "attention_pool"] = "class_token"
    """Input of the linear classifier: the class token, the normalized mean patch token, or attention pooling with that
    mean as its query."""
    final_norm: bool = True
    """Whether `mean_pool` reads tokens after the final norm of the backbone; false as in MAE and SIM."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy. 0 disables it."""
    mixup: float = Field(default=0.0, ge=0)
    """Mixup α: the weight of the first image is sampled from Beta(α, α). 0 disables mixup."""
    cutmix: float = Field(default=0.0, ge=0)
    """CutMix α: the area of the first image is sampled from Beta(α, α). 0 disables CutMix."""
    mix_prob: float = Field(default=1.0, gt=0, le=1)
    """Probability of mixing a micro-batch."""
    switch_prob: float = Field(default=0.5, gt=0, lt=1)
    """Probability of CutMix instead of mixup, if both are enabled."""
    batch_norm: bool = False
    """Normalize the input of a linear head by micro-batch statistics over all ranks, without learnable scale."""
    sweep: Sweep | None = None
    """Train many linear heads on a frozen backbone in one pass. Default: a single head."""

    @model_validator(mode="after")
    def _sweeps(self) -> Self:
        if self.batch_norm and not self.freeze:
            raise ValueError("batch_norm is for a linear head on a frozen backbone: freeze: true")
        if self.sweep is not None and not self.freeze:
            raise ValueError("sweep is for a frozen backbone, which would learn from all heads at once: freeze: true")
        if self.sweep is not None and self.pool != "class_token":
            raise ValueError("pool has no effect: sweep says what its heads read")
        if not self.final_norm and self.pool != "mean_pool":
            raise FixableError(f"final_norm has no effect with pool: {self.pool}", "pool: mean_pool")
        return self

    @model_validator(mode="after")
    def _mixes(self) -> Self:
        both, none = bool(self.mixup and self.cutmix), not (self.mixup or self.cutmix)
        for name, idle in (("mix_prob", none), ("switch_prob", not both)):
            if idle and name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect without {'mixup or cutmix' if none else 'mixup and cutmix'}")
        return self

    def recipe(self) -> dict[str, Any]:
        """Return a recipe that predicts the class label from the uncropped image, with every head of a sweep."""
        sweep, decoder_of = self.sweep, {"category": "pool"}
        if sweep is not None:
            decoder_of = {name: decoder for name, (decoder, _) in sweep.heads().items()}
        targets = [
            {
                "name": name,
                "kind": "category",
                "inputs": ["image"],
                "decoder": decoder,
                "distribution": {"kind": "boltzmann", "label_smoothing": self.label_smoothing},
                **({"batch_norm": True} if self.batch_norm else {}),
            }
            for name, decoder in decoder_of.items()
        ]
        pool = {"kind": self.pool} | ({} if self.final_norm else {"final_norm": False})
        return {
            "name": "classification",
            "family": "supervised",
            "inputs": [{"name": "image", "view": 1}],
            "decoders": {"pool": pool} if sweep is None else sweep.decoders(),
            "targets": targets,
        }

    @property
    def chooses_head(self) -> bool:
        return self.sweep is not None

    def check(self, run: RunConfig, model: VisionConfig) -> None:
        from m3i_scale.backbones.families import TokenFamily, family_of

        super().check(run, model)
        family = family_of(model)
        if self.sweep is not None:
            _check_sweep(run, family)
        if not (self.final_norm or isinstance(family, TokenFamily)):
            raise ConfigError(
                f"final_norm has no effect: {family.name} has no final norm",
                where="task.final_norm: false",
                fix="set task.final_norm=true",
            )
        if self.pool == "class_token" and not family.has_class_token:
            raise ConfigError(
                f"{family.name} has no class token for task.pool=class_token",
                where="task.pool",
                fix="set task.pool=mean_pool",
            )
        augment, mixes = run.data.augment, self.mixup or self.cutmix
        kinds = (augment, *(source.augment for source in run.data.datasets.values()))
        if any(one is not None and one.rand_augment is not None for one in kinds):
            _check_timm("RandAugment is", "data.augment.rand_augment=null")
        if augment.erasing:
            _check_timm("random erasing is", "data.augment.erasing=0")
        if mixes:
            _check_timm("mixup and cutmix are", "task.mixup=0 task.cutmix=0")
        if mixes and run.optim.micro_batch_size % 2:
            raise ConfigError(
                "optim.micro_batch_size must be even, because mixup and cutmix pair images, got "
                f"{run.optim.micro_batch_size}",
                where="optim.micro_batch_size",
                fix="set an even optim.micro_batch_size, or turn off mixup and cutmix",
            )

    def check_classes(self, label_sets: dict[str, list[str]]) -> None:
        super().check_classes(label_sets)
        if not label_sets:
            raise ConfigError(
                "no dataset has class labels",
                where="data.datasets",
                why=f"no {LABELS} is next to the shards",
                fix=f"make the shards with labels (`shards make`), or put {LABELS}, a list of class names, next to "
                "them",
            )

    def prepare(self, objective: Objective, classes: int, erasing: float = 0.0) -> None:
        super().prepare(objective, classes, erasing)
        changes: list[Callable[[Batch], Batch]] = []
        if erasing:
            from m3i_scale.tasks.classification.timm_augmentation import Erasing

            changes.append(Erasing(erasing, objective.pixel_norm))
        if self.mixup or self.cutmix:
            changes.append(self.label_mixing(classes))
        if changes:
            objective.mix_labelled = lambda batch: reduce(lambda changed, change: change(changed), changes, batch)

    def label_mixing(self, classes: int) -> LabelMixing:
        """Return mixup and cutmix for a number of classes."""
        from timm.data.mixup import Mixup

        from m3i_scale.tasks.classification.timm_augmentation import LabelMixing

        mixup = Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mix_prob,
            switch_prob=self.switch_prob,
            label_smoothing=self.label_smoothing,
            num_classes=classes,
        )
        return LabelMixing(mixup)

    def lr_scales(self, objective: Objective) -> dict[str, float]:
        """Return the multipliers of the heads of a sweep, else those of the layers."""
        if self.sweep is None:
            return super().lr_scales(objective)
        of_head = {name: scale for name, (_, scale) in self.sweep.heads().items()}
        return {
            f"heads.{head}.{name}": scale
            for head, scale in of_head.items()
            for name, _ in objective.heads[head].named_parameters()
        }


def _check_sweep(run: RunConfig, family: Family) -> None:
    if not family.has_class_token:
        raise ConfigError(
            f"the heads of a sweep read class tokens, but {family.name} has none",
            where="task.sweep",
            fix="leave out task.sweep, and set task.pool=mean_pool",
        )
    if run.guard.spike is not None:
        raise ConfigError(
            "guard.spike cannot be combined with a sweep: a loss spike of one head would roll back all of them",
            where="guard.spike",
            why="the highest learning rate of a sweep often diverges",
            fix="leave out guard.spike",
        )
    if run.optim.clip_grad_norm:
        raise ConfigError(
            "gradient clipping cannot be combined with a sweep: it would clip the gradient of all heads together",
            where=f"optim.clip_grad_norm: {run.optim.clip_grad_norm:g}",
            why="heads would depend on each other",
            fix="set optim.clip_grad_norm=0",
        )
    if run.data.datasets and not run.data.validation:
        raise ConfigError(
            "a sweep selects its best head on validation data, but there is none",
            where="data.validation",
            fix="set data.validation.val.path=/data/shards/val and evaluation.every_steps",
        )


def _check_timm(what: str, without: str) -> None:
    """Check that timm is installed, which an option needs."""
    if importlib.util.find_spec("timm") is None:
        raise ConfigError(
            f"{what} timm's, which is not installed",
            where=without.partition("=")[0],
            fix=f"run `pip install -e '.[timm]'`, or set {without}",
        )
