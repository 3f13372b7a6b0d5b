"""Config section `task`: a labelled task that replaces `recipe`.

A task defines how a backbone is fine-tuned or probed. It generates a recipe for its predictions, so that all
pre-training features also work for tasks.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from m3i_scale.config.kinds import Kind
from m3i_scale.config.limits import MAX_CANDIDATES, MAX_LAYERS, MAX_WIDTH
from m3i_scale.config.sections import Section


class Task(Kind):
    """Base class of tasks that fine-tune a backbone or train a head on it."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    dense: ClassVar[bool] = False
    """Whether the task predicts locations instead of image labels. InternImage then uses other learning rates."""

    freeze: bool = False
    """Freeze the backbone in evaluation mode and train only the heads."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Layer-wise learning-rate decay: each backbone layer's rate is this factor times the next layer's
    (docs/downstream.md)."""
    dcn_lr: float = Field(default=1.0, gt=0)
    """InternImage: additional LR multiplier for the offsets of deformable convolutions (`DCN_LR_MUL`)."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth: drop probability of residual branches at the last layer, increasing linearly from 0 at the
    first."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an EMA of all weights, exported with `export --weights ema`. In step t the decay is at most t / (9
    + t), so that the EMA forgets the initial weights. Evaluations during training use the trained weights. Default: no
    EMA."""

    @model_validator(mode="after")
    def _acts(self) -> Self:
        idle = [name for name in ("layer_decay", "dcn_lr", "drop_path") if getattr(self, name) not in (0.0, 1.0)]
        if self.freeze and idle:
            raise ValueError(f"{', '.join(idle)} has no effect: the backbone is frozen")
        if self.freeze and self.ema is not None:
            raise ValueError("ema averages a backbone and its head together, and this backbone is frozen")
        return self

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """Return the content of the section `recipe` for this task."""


class Sweep(Section):
    """Grid of linear heads over input features and learning rates, trained independently in one pass. The best head on
    data.validation is exported."""

    blocks: tuple[int, ...] = (1, 4)
    """Numbers of last layers whose class tokens are concatenated, each normalized by the backbone's final norm."""
    mean: tuple[bool, ...] = (False, True)
    """Whether to append the mean patch token of the last layer."""
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
        if len(self.heads()) < len(self.decoders()) * len(self.lr_scales):
            raise ValueError(
                f"lr_scales differ by the sixth digit at least, by which heads are named: {self.lr_scales}"
            )
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


class Classification(Task):
    """Image classification task."""

    kind: ClassVar[str] = "classification"
    pool: Literal["class_token", "mean_pool", "attention_pool"] = "class_token"
    """Input of the linear classifier: the class token, the normalized mean patch token, or attention pooling with that
    mean as its query."""
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
        return {
            "name": "classification",
            "family": "supervised",
            "inputs": [{"name": "image", "view": 1}],
            "decoders": {"pool": {"kind": self.pool}} if sweep is None else sweep.decoders(),
            "targets": targets,
        }


class SegmentationHead(Kind):
    """Head that predicts the class of every pixel from the features of the backbone."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    module: ClassVar[str]
    """Import path of the `PixelHead` to build; user-defined kinds set it to their class."""


class LinearSegmentation(SegmentationHead):
    """Linear classifier on the batch-normalized patch tokens of the last layer."""

    kind: ClassVar[str] = "linear"
    module: ClassVar[str] = "m3i_scale.objective.segmentation.LinearPixelHead"

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Channel dropout probability before the classifier, in training."""


class UperNetSegmentation(SegmentationHead):
    """UPerNet on four feature maps. For a plain Transformer they are four of its layers, scaled ×4, ×2, ×1, ×½ by
    transposed convolutions and pooling as in BEiT and MAE. For InternImage they are its stages."""

    kind: ClassVar[str] = "upernet"
    module: ClassVar[str] = "m3i_scale.objective.segmentation.UperNet"

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Channel dropout probability before the classifiers, in training."""
    channels: int = Field(default=512, ge=1, le=MAX_WIDTH)
    """Width of the head in channels."""
    out_layers: tuple[int, int, int, int] | None = None
    """Output layers of the backbone, from 1. Default: the layers at a third, a half and two thirds of the depth, and
    the last: 4, 6, 8, 12 of 12."""
    auxiliary_weight: float = Field(default=0.4, ge=0)
    """Loss weight of an auxiliary convolutional head on the third feature map. 0 disables it."""

    @field_validator("out_layers")
    @classmethod
    def _ascend(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (list(layers) != sorted(set(layers)) or layers[0] < 1):
            raise ValueError("out_layers are four different layers in ascending order, from 1 on")
        return layers


class EomtSegmentation(SegmentationHead):
    """EoMT mask classification: queries pass through the last blocks of a plain Transformer."""

    kind: ClassVar[str] = "eomt"
    module: ClassVar[str] = "m3i_scale.objective.mask_queries.MaskQueries"

    queries: int = Field(default=100, ge=1, le=MAX_CANDIDATES)
    """Number of queries."""
    blocks: int = Field(default=4, ge=1, le=MAX_LAYERS)
    """Number of last backbone blocks that process the queries."""
    class_weight: float = Field(default=2.0, ge=0)
    """Weight of the cross-entropy of query classes, in the loss and in the matching."""
    mask_weight: float = Field(default=5.0, ge=0)
    """Weight of the pixel-wise cross-entropy of matched masks."""
    dice_weight: float = Field(default=5.0, ge=0)
    """Weight of the Dice loss of matched masks."""
    no_object_weight: float = Field(default=0.1, gt=0, le=1)
    """Weight of unmatched queries (class "no object") in the cross-entropy of query classes."""
    points: int = Field(default=12544, ge=1, le=MAX_CANDIDATES)
    """Sampled pixels per mask for its losses, mostly where the prediction is uncertain."""

    @model_validator(mode="after")
    def _matches(self) -> Self:
        if not (self.class_weight or self.mask_weight or self.dice_weight):
            raise ValueError("class_weight, mask_weight and dice_weight are all 0: nothing would be learnt")
        return self


class Segmentation(Task):
    """Semantic segmentation task. Its classes come from mask_labels.json next to the shards."""

    kind: ClassVar[str] = "segmentation"
    dense: ClassVar[bool] = True

    head: SegmentationHead = UperNetSegmentation()
    """Segmentation head: upernet | linear | eomt, or with options, e.g. {kind: upernet, channels: 768}."""

    @model_validator(mode="after")
    def _averages_no_statistics(self) -> Self:
        if self.ema is not None:
            raise ValueError(
                "ema averages weights alone, and a segmentation head may keep more: batch norm has statistics"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """Return a recipe that predicts the class of every pixel from the uncropped image."""
        target = {
            "name": "segmentation",
            "kind": "segmentation",
            "inputs": ["image"],
            "decoder": "patches",
            "head": self.head.model_dump(mode="json"),
        }
        return {
            "name": "segmentation",
            "family": "supervised",
            "inputs": [{"name": "image", "view": 1}],
            "decoders": {"patches": {"kind": "pointwise"}},
            "targets": [target],
        }
