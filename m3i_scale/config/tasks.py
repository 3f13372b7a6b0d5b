"""Define what a labelled task is trained by: the section `task` of a run file, in place of `recipe`.

A task says how a backbone is fine-tuned or probed. What is predicted from what is a recipe all the same, which the task
gives, so that everything that serves pre-training serves it too.
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
    """Fine-tunes a backbone, or trains a head on it."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    dense: ClassVar[bool] = False
    """Whether places of the image are predicted, and not the image: InternImage has other learning rates then."""

    freeze: bool = False
    """The backbone stays as it is, in evaluation mode; heads alone are trained."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Every layer of the backbone learns at so much of the rate of the layer behind it (docs/downstream.md)."""
    dcn_lr: float = Field(default=1.0, gt=0)
    """InternImage: further factor of the rate of the offsets of deformable convolutions (`DCN_LR_MUL`)."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a sample skips a residual branch, at the last layer; a linear ramp from 0 at the first."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an EMA of all weights, which `export --weights momentum` takes. In step t the decay is at most
    t / (9 + t), so that the EMA forgets the initial weights. Evaluations during training measure the trained weights.
    Default: no EMA."""

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
        """Return what is predicted from what, as the section `recipe` has it."""


class Sweep(Section):
    """Trains a linear head for every choice of what it reads and how fast it learns, each as if it were alone; the best
    one on data.validation is exported."""

    blocks: tuple[int, ...] = (1, 4)
    """The class tokens of so many last layers are read, each normalised by the backbone's last norm."""
    mean: tuple[bool, ...] = (False, True)
    """Whether the mean of the last layer's patches is read beside them."""
    lr_scales: tuple[float, ...] = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
    """Shares of optim.lr."""

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
        """Return what heads read, by name, as a recipe has it."""
        return {
            f"last{blocks}{'_mean' if mean else ''}": {"kind": "class_token", "blocks": blocks, "mean": mean}
            for blocks in self.blocks
            for mean in self.mean
        }

    def heads(self) -> dict[str, tuple[str, float]]:
        """Return what a head reads and its share of the rate, by its name."""
        return {
            f"{decoder}_lr{scale:g}".replace(".", "_"): (decoder, scale)
            for decoder in self.decoders()
            for scale in self.lr_scales
        }


class Classification(Task):
    """Predicts the class of an image."""

    kind: ClassVar[str] = "classification"
    pool: Literal["class_token", "mean_pool", "attention_pool"] = "class_token"
    """What the linear classifier reads: the class token, the mean of the patches, normalised, or attention with that
    mean as its query."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)
    """α of the share of the first image, drawn from Beta(α, α), when two are blended; 0: none are."""
    cutmix: float = Field(default=0.0, ge=0)
    """α of the share of the first image when a rectangle of it is replaced; 0: none is."""
    mix_prob: float = Field(default=1.0, gt=0, le=1)
    """Probability that a micro-batch is mixed."""
    switch_prob: float = Field(default=0.5, gt=0, lt=1)
    """Probability of cutmix, where both are asked for."""
    batch_norm: bool = False
    """Normalise what a linear head reads by the statistics of a micro-batch of all ranks, without a learnt scale."""
    sweep: Sweep | None = None
    """Many linear heads on a frozen backbone in one pass. Default: one."""

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
        """Return a category predicted from the whole image, by every head of a sweep."""
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
    """Predicts the class of every pixel from what the backbone gives."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    module: ClassVar[str]
    """Import path of the `PixelHead` that is built of it; a kind of one's own names its own."""


class LinearSegmentation(SegmentationHead):
    """Classifies every patch token of the last layer, batch-normalised."""

    kind: ClassVar[str] = "linear"
    module: ClassVar[str] = "m3i_scale.objective.segmentation.LinearPixelHead"

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability that a channel is left out, before the classifier, while training."""


class UperNetSegmentation(SegmentationHead):
    """Joins maps of four sizes by UPerNet. A plain Transformer's are made of four of its layers, scaled ×4, ×2, ×1, ×½
    by transposed convolutions and pooling, as BEiT and MAE are fine-tuned; an InternImage has them in its stages."""

    kind: ClassVar[str] = "upernet"
    module: ClassVar[str] = "m3i_scale.objective.segmentation.UperNet"

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability that a channel is left out, before the classifiers, while training."""
    channels: int = Field(default=512, ge=1, le=MAX_WIDTH)
    """Width of the head."""
    out_layers: tuple[int, int, int, int] | None = None
    """Layers that are read, from 1. Default: the layers at a third, a half and two thirds of the depth, and the last:
    4, 6, 8, 12 of 12."""
    auxiliary_weight: float = Field(default=0.4, ge=0)
    """Weight of the loss of a small convolutional head on the third map; 0: there is none."""

    @field_validator("out_layers")
    @classmethod
    def _ascend(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (list(layers) != sorted(set(layers)) or layers[0] < 1):
            raise ValueError("out_layers are four different layers in ascending order, from 1 on")
        return layers


class EomtSegmentation(SegmentationHead):
    """Predicts masks and their classes by queries that go through the last blocks of a plain Transformer, as EoMT."""

    kind: ClassVar[str] = "eomt"
    module: ClassVar[str] = "m3i_scale.objective.mask_queries.MaskQueries"

    queries: int = Field(default=100, ge=1, le=MAX_CANDIDATES)
    blocks: int = Field(default=4, ge=1, le=MAX_LAYERS)
    """Of the backbone, counted from the last, that the queries go through."""
    class_weight: float = Field(default=2.0, ge=0)
    """Weight of the cross-entropy of the queries' classes, in the loss and in the matching."""
    mask_weight: float = Field(default=5.0, ge=0)
    """Weight of the cross-entropy of the pixels of matched masks."""
    dice_weight: float = Field(default=5.0, ge=0)
    """Weight of the Dice loss of matched masks."""
    no_object_weight: float = Field(default=0.1, gt=0, le=1)
    """What a query counts that matches no mask."""
    points: int = Field(default=12544, ge=1, le=MAX_CANDIDATES)
    """Pixels of a mask that its losses are computed of, most of them where it is uncertain."""

    @model_validator(mode="after")
    def _matches(self) -> Self:
        if not (self.class_weight or self.mask_weight or self.dice_weight):
            raise ValueError("class_weight, mask_weight and dice_weight are all 0: nothing would be learnt")
        return self


class Segmentation(Task):
    """Predicts the class of every pixel. Its classes are those of mask_labels.json beside the shards."""

    kind: ClassVar[str] = "segmentation"
    dense: ClassVar[bool] = True

    head: SegmentationHead = UperNetSegmentation()
    """upernet | linear | eomt, or {kind: upernet, channels: 768}."""

    @model_validator(mode="after")
    def _averages_no_statistics(self) -> Self:
        if self.ema is not None:
            raise ValueError(
                "ema averages weights alone, and a segmentation head may keep more: batch norm has statistics"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """Return the class of every pixel predicted from the whole image."""
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
