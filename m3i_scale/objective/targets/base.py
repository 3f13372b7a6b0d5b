"""Base classes of targets: fields, validation rules, and the arguments of losses. −log P̂ of one target from one input
is loss term k of equation (5). A target is data; it gets its modules as arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from m3i_scale.backbones.base import Backbone, Tokens
from m3i_scale.config import RunConfig, Section
from m3i_scale.config.data import Reads
from m3i_scale.config.sections import MAX_VIEWS, Kind
from m3i_scale.data.batch import Batch
from m3i_scale.data.remote.access import Access
from m3i_scale.errors import did_you_mean
from m3i_scale.objective.decoders import DecoderSpec, PointwiseSpec, pool
from m3i_scale.objective.distributions import Loss
from m3i_scale.objective.encoders import TeacherSpec
from m3i_scale.objective.heads import HeadSpec
from m3i_scale.objective.inputs import EncodedInput, InputSpec, MixSpec
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.regularizers import Memory
from m3i_scale.objective.schedule import NotNegative, Scheduled, values_of
from m3i_scale.tasks.base import TARGETS


class Parts(Section):
    """Parts of a recipe that targets refer to by name."""

    inputs: list[InputSpec] = Field(min_length=1)
    """Inputs of the backbone: which views, masked how."""
    mix: MixSpec | None = None
    """Mixing of inputs from different images into one. Default: off."""
    decoders: dict[str, DecoderSpec]
    """Decoders (f_ψ) by name."""
    heads: dict[str, HeadSpec] = Field(default_factory=dict)
    """Projection heads by name."""
    teachers: dict[str, TeacherSpec] = Field(default_factory=dict)
    """Frozen teachers by name."""

    def input(self, name: str) -> InputSpec:
        """Return the input with this name."""
        return next(spec for spec in self.inputs if spec.name == name)

    def shows(self, view: int) -> str | None:
        """Return the name of an input that sees all patches of a view, or None."""
        if self.mix is not None:
            return None
        return next((spec.name for spec in self.inputs if view in spec.seen and spec.mask is None), None)

    def is_small(self, view: int) -> bool:
        """Return whether a view, from 1, is a local crop: its size differs from the backbone's."""
        return False


@dataclass
class Encoded:
    """One encoded input, indexed by image."""

    where: EncodedInput
    cls_BND: Tensor
    """Class tokens; the last layer comes last. Only one layer unless a decoder reads several."""
    tokens_BLD: Tensor
    """Visible tokens only."""
    maps: list[Tensor] = field(default_factory=list)
    """Intermediate outputs of layers or stages, if a head needs them: (B, C, H, W) each."""
    norm: Callable[[Tensor], Tensor] | None = None
    """The final norm of the backbone, if the tokens are before it."""

    def pooled(self, decoder: nn.Module) -> Tensor:
        """Return the pooling decoder's output per image: (B, F)."""
        norm = None if getattr(decoder, "before_norm", False) else self.norm
        parts = (self.cls_BND, self.tokens_BLD)
        return pool(decoder, *(parts if norm is None else map(norm, parts)))

    def tapped(self, squared_norms: list[Tensor]) -> Encoded:
        """Return an alias that appends the squared norms of its gradients to a list."""
        if not self.tokens_BLD.requires_grad:
            return self
        cls_BND, tokens_BLD = (part.view_as(part) for part in (self.cls_BND, self.tokens_BLD))
        for part in (cls_BND, tokens_BLD):
            part.register_hook(lambda gradient: squared_norms.append(_squared_norm(gradient)))
        return replace(self, cls_BND=cls_BND, tokens_BLD=tokens_BLD)


def _squared_norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
    return norm.square()


@dataclass
class Context:
    """Tensors that the targets of one micro-batch share, so that nothing is computed twice."""

    batch: Batch
    views: dict[int, Tensor]
    """Normalized images by view, from 1."""
    inputs: dict[str, list[Encoded]]
    whole: dict[int, Encoded]
    """Inputs that see all patches of a view, by view."""
    encoded_views: dict[tuple[str, int], Tokens]
    """Views encoded by the EMA teacher or a frozen teacher, by (`encoder_key` of the target, view)."""
    counts: dict[str, Tensor]
    """Number of samples over all ranks that have the target, by target: fp32."""
    measures: bool = False
    """Whether this step is logged: estimating the information needs an eigenvalue decomposition."""
    text_BE: Tensor | None = None
    """Encoded captions of this rank, if the recipe has a text tower."""
    text: Any = None
    """`PairTargets` of the captions, for text targets."""
    layers: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    """Outputs of the last layers by (`encoder_key`, view), if targets average them: (B, D, H, W), final layer last."""
    dense: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    """Standardized dense targets, by (`encoder_key`, view, layers)."""
    statistics: dict[tuple[str, str, int, int], Tensor | None] = field(default_factory=dict)
    """Statistics of dense targets, by (regularizer as JSON, `encoder_key`, view, layers), and numbers of caption
    tokens."""
    clusters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Cluster assignments of patches and the clustering loss, by target."""


@dataclass
class TargetModules:
    """The modules that compute a target."""

    ranks: Ranks
    grid: tuple[int, int]
    patch_size: int
    decoder: Any
    head: Any
    """Module after the decoder: the target's head, or the recipe's head that it names."""
    squared_norms: list[Tensor]
    """Squared norms of this target's gradients at the encoder output."""
    memory: Any = None
    projector: Any = None
    """Runs before the decoder of dense EMA targets."""
    momentum: Any = None
    """The EMA teacher, for `encoder: ema`."""


@dataclass
class Sizes:
    """Sizes needed to build the head of a target."""

    decoded: int
    """Output width of the decoder."""
    encoded: int
    """Width of the tokens from f_φ: the teacher's or the backbone's."""
    classes: list[int]
    """Number of classes of every label set."""
    vocabulary: int
    """Size of the tokenizer's vocabulary; 0 without text targets."""
    backbone: Backbone
    ranks: Ranks
    image_counts: list[int] | None = None
    """Number of training images per class, if categories.json contains it."""


class Scores(ABC):
    """Scores of a target over an evaluation, which are no means over micro-batches."""

    @abstractmethod
    def add(self, batch: Batch, outputs: dict[str, Any]) -> None:
        """Add a batch, on the CPU, and `Loss.outputs` of the target for it."""

    @abstractmethod
    def compute(self, ranks: Ranks) -> dict[str, float]:
        """Return the scores by name. Every rank must call it."""


class Target(Kind):
    """Loss term k of equation (5): a target y, its representation z_y, its prediction ẑ_y and P̂."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}
    modules: ClassVar[dict[str, str]] = TARGETS
    modality: ClassVar[str] = "image"
    """category, text, caption, pixels or image."""
    representation: ClassVar[str]
    """z_y as the paper's table names it."""
    dense: ClassVar[bool] = False
    """Whether z_y is a map over patches."""
    by_token: ClassVar[bool] = False
    """Whether z_y is a token of the caption."""
    is_image_level: ClassVar[bool] = False
    """Whether the loss reads inputs only through pooling decoders (`Encoded.pooled`), so that it can cover all
    micro-batches of a step."""
    labels_file: ClassVar[str | None] = None
    """Sidecar file of the shards with the names of predicted classes."""

    name: str = Field(min_length=1)
    """Name of the target in logs and metrics."""
    inputs: list[str] = Field(min_length=1)
    """Inputs that predict it; the loss is the mean over their parts."""
    encoder: str
    """Target encoder (f_φ)."""
    decoder: str
    """Name of a decoder of the recipe: f_ψ."""
    distribution: Any
    """Loss (P̂)."""
    regularizer: Any
    """Collapse prevention of the target."""
    weight: Scheduled[NotNegative] = 1.0
    """w_k of equation (6): a number, or a schedule, which may be 0 temporarily."""

    @field_validator("distribution", "regularizer")
    @classmethod
    def _is_declared(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject a value that was not parsed: the class of the target must declare the valid classes."""
        if not isinstance(value, Kind):
            raise ValueError(f"{cls.kind} does not declare the family of its {info.field_name}")
        return value

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float | list[tuple[float, float]]) -> float | list[tuple[float, float]]:
        if max(values_of(weight)) == 0:
            raise ValueError("a weight of 0 all the time: leave the target out")
        return weight

    # -------------------------------------------------------------------- modules

    def build_head(self, sizes: Sizes) -> nn.Module:
        """Return the module after the decoder, if the recipe has no head for it."""
        raise NotImplementedError

    @property
    def reads(self) -> Reads:
        """Return the annotations that the data loader has to read for the target."""
        return "labels"

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Return the names of additional evaluation metrics."""
        return ()

    def check_scores(self, run: RunConfig, access: Access | None) -> bool:
        """Return whether evaluations of a run can compute `scores`. `access` is for remote servers."""
        return True

    def scores(self, label_sets: dict[str, list[str]]) -> Scores | None:
        """Return the scores that are computed from outputs, or None. `label_sets`: class names by label set."""
        return None

    def sources(self, context: Context) -> list[Encoded]:
        """Return the parts of inputs that predict the target."""
        return [part for name in self.inputs for part in context.inputs[name]]

    def present(self, batch: Batch) -> Tensor:
        """Return which samples have the target: bool (B)."""
        return torch.ones_like(batch.has_text_B)

    @abstractmethod
    def loss(self, given: TargetModules, context: Context, encoded: Encoded) -> Loss:
        """Return this rank's share of −log P̂ of the target from one input. Schedules are numbers by now."""

    def losses(self, given: TargetModules, context: Context, parts: list[Encoded]) -> list[Loss]:
        """Return `loss` of every part of the inputs. Targets may override it to compute them together."""
        return [self.loss(given, context, part) for part in parts]

    @property
    def covers_steps(self) -> bool:
        """Return whether the loss can cover all micro-batches of a step: it is image-level, or it depends on other
        samples only through `collect`."""
        return self.is_image_level or not self.compares_samples

    @property
    def has_statistics(self) -> bool:
        """Return whether `collect` adds statistics."""
        return False

    def collect(self, given: TargetModules, context: Context) -> None:
        """Add the statistics over a micro-batch that `loss` needs to the context, unless it has them. Losses over
        several micro-batches use the means of their statistics."""

    # -------------------------------------------------------------------- validation and description

    @property
    def title(self) -> str:
        """Return its kind with an article, for error messages."""
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind} target"

    @property
    def compares_samples(self) -> bool:
        """Return whether the loss needs at least two samples in the global micro-batch."""
        return bool(self.regularizer.within_batch)

    @property
    def collapses_alone(self) -> bool:
        """Return whether a recipe with only this target could collapse, for any regularizer."""
        return False

    def summary(self) -> dict[str, Any]:
        """Return the row of the paper's table as plain data."""
        view = getattr(self, "view", None)
        return {
            "name": self.name,
            "inputs": self.inputs,
            "modality": self.modality,
            "view": view,
            "tokens": getattr(self, "tokens", None if view is None else "pooled"),
            "representation": self.representation,
            "encoder": self.encoder,
            "teacher": getattr(self, "teacher", None) if self.encoder == "teacher" else None,
            "distribution": self.distribution.kind,
            "regularizer": self.regularizer.kind,
            "weight": [list(pair) for pair in self.weight] if isinstance(self.weight, list) else self.weight,
        }

    def kinds_of(self, field: str) -> dict[str, Any]:
        """Return the valid classes of a field, by name."""
        family = cast(type[Kind], type(self).model_fields[field].annotation)
        return {name: family.kinds[name] for name in family.choices()}

    def errors(self, parts: Parts) -> Iterator[str]:
        """Yield validation errors as text."""
        names = [spec.name for spec in parts.inputs]
        unknown = [name for name in self.inputs if name not in names]
        if unknown:
            yield f"no input '{unknown[0]}'; {did_you_mean(unknown[0], names)}"
        elif self.decoder not in parts.decoders:
            yield f"no decoder '{self.decoder}'; {did_you_mean(self.decoder, parts.decoders)}"
        else:
            yield from self._errors(parts)

    def _errors(self, parts: Parts) -> Iterator[str]:
        decoder = parts.decoders[self.decoder]
        answers = self.dense, self.by_token
        if (decoder.dense, decoder.by_token) != answers:
            kinds = cast(dict[str, Any], DecoderSpec.kinds)
            valid = [name for name, kind in kinds.items() if (kind.dense, kind.by_token) == answers]
            yield f"{self.title} is decoded by {' or '.join(valid)}, not {decoder.kind}"
        if self.encoder not in self.regularizer.encoders:
            valid = [name for name, kind in self.kinds_of("regularizer").items() if self.encoder in kind.encoders]
            yield (
                f"'{self.regularizer.kind}' does not keep {self.title} with encoder {self.encoder} from "
                f"collapsing, or has no effect on it; valid: {', '.join(valid) or 'none'}"
            )


class ImageTarget(Target):
    """A target that is a view of the image."""

    compares_tokens: ClassVar[bool] = False
    """Whether the loss compares backbone tokens, so that the decoder must be pointwise."""

    view: int = Field(ge=1, le=MAX_VIEWS)
    """Target view."""
    encoder: Literal["ema", "online", "teacher"]
    teacher: str = "teacher"
    """Name of a teacher of the recipe, for `encoder: teacher`."""
    pairs: Literal["all", "own", "other"] = "all"
    """Parts of the inputs that predict it: all, only from the same view, or only from other views."""

    @property
    def encoder_key(self) -> str:
        """Return the key of f_φ in a `Context`: the encoder, or the name of the frozen teacher."""
        return f"teachers.{self.teacher}" if self.encoder == "teacher" else self.encoder

    def sources(self, context: Context) -> list[Encoded]:
        return [part for part in super().sources(context) if self.takes(part.where.view + 1)]

    def predicted_from(self, parts: Parts) -> list[tuple[InputSpec, int]]:
        """Return the pairs of input and view that predict the target."""
        specs = [parts.input(name) for name in self.inputs]
        return [(spec, view) for spec in specs for view in spec.seen if self.takes(view)]

    def takes(self, view: int) -> bool:
        """Return whether parts of inputs from a view, from 1, predict the target."""
        return self.pairs == "all" or (view == self.view) == (self.pairs == "own")

    @property
    def averages_prototypes(self) -> bool:
        """Return whether z_y is compared with the EMA copy of its head's prototypes."""
        return False

    def _errors(self, parts: Parts) -> Iterator[str]:
        yield from super()._errors(parts)
        if self.encoder == "teacher" and self.teacher not in parts.teachers:
            example = f"recipe.teachers.{self.teacher}.from_pretrained=/data/models/dinov2-base"
            fix = did_you_mean(self.teacher, parts.teachers) if parts.teachers else f"set one, e.g. {example}"
            yield f"no teacher '{self.teacher}'; {fix}"
        decoder = parts.decoders[self.decoder]
        if self.compares_tokens and not isinstance(decoder, PointwiseSpec):
            yield f"{self.title} compares backbone tokens: the decoder must be pointwise, not {decoder.kind}"
        pairs = self.predicted_from(parts)
        if not pairs:
            yield f"`pairs: {self.pairs}` leaves nothing that predicts it"
        if parts.is_small(self.view):
            yield f"view {self.view} is a small one: targets lie in views of the backbone's size"
        if self.dense and any(parts.is_small(view) for _, view in pairs):
            yield "small views predict targets of the whole view alone, no patches"
        if self.encoder == "online":
            if parts.shows(self.view) is None:
                yield f"`encoder: online` needs an input that shows all of view {self.view}, without mask and mix"
            if any(view == self.view for _, view in pairs):
                yield "an input that shows its own target predicts nothing"
        shown = parts.mix is None and any(view == self.view and spec.mask is None for spec, view in pairs)
        # With EMA prototypes, centering moves the target away from the prediction.
        if self.encoder == "ema" and shown and not self.averages_prototypes:
            yield (
                "a backbone that sees all of the target need only copy its own average: hide patches, take another view"
            )


class HeadTarget(ImageTarget):
    """A target with a projection head of the recipe, for prediction and target."""

    head: str
    """Name of a head of the recipe."""

    @property
    def covers_steps(self) -> bool:
        """Return whether the head's memory is updated once per step: only if the target is image-level."""
        return self.is_image_level

    @property
    def memory_name(self) -> str:
        """Return the name of the head's memory for targets of this kind."""
        return self.head

    def build_memory(self, spec: HeadSpec) -> Memory:
        """Return the head's memory of earlier batches."""
        memory: Memory = self.regularizer.memory(spec.width)
        return memory

    @property
    def remembers(self) -> dict[str, Any]:
        """Return the settings that all targets of a head must share, because the head has one memory."""
        fields = self.regularizer.memory_fields
        names = type(self.regularizer).model_fields if fields is None else fields
        common = {name: getattr(self.regularizer, name) for name in names}
        return {"target": self.kind, "kind": self.regularizer.kind, **common}

    def _errors(self, parts: Parts) -> Iterator[str]:
        if self.head not in parts.heads:
            yield f"no head '{self.head}'; {did_you_mean(self.head, parts.heads) if parts.heads else 'there is none'}"
        else:
            yield from super()._errors(parts)
            yield from self._head_errors(parts.heads[self.head])

    def _head_errors(self, head: HeadSpec) -> Iterator[str]:
        if head.prototypes:
            yield f"`prototypes` of head '{self.head}' have no effect: they are for `prototypes` and `dense_prototypes`"
