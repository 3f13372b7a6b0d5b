"""A recipe: inputs × targets, as data.

Every approach of the paper's table is one choice of the input x = t_x(s), the target y = t_y(s), its representation
z_y = f_φ(y), the prediction ẑ_y = f_ψ(z_x), the distribution P̂ and what keeps z_y from collapsing. Nothing in this
package branches on the name of a method.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config import Section, parse_section
from m3i_scale.errors import ConfigError, did_you_mean

Modality = Literal["category", "text", "pixels", "image"]
Regularizer = Literal["none", "negatives", "stop_gradient", "unigrad"]

_ENCODERS = {"category": ("embedding",), "text": ("text_tower",), "pixels": ("patchify",), "image": ("momentum",)}
_DECODERS = {"boltzmann": ("attention_pool", "mean_pool"), "gaussian": ("transformer",)}
_REGULARIZERS = {
    "category": ("negatives",),
    "text": ("negatives",),
    "pixels": ("none",),
    "image": ("stop_gradient", "unigrad"),
}
_DISTRIBUTIONS = {"category": "boltzmann", "text": "boltzmann", "pixels": "gaussian", "image": "gaussian"}


class MaskSpec(Section):
    """Which patches of an input the encoder does not see."""

    form: Literal["random", "block"] = "random"
    """random: independent patches; block: a union of rectangles."""
    ratio: float = Field(gt=0, lt=1)
    """Share of hidden patches; the count is rounded to a whole patch and is the same for every sample."""


class InputSpec(Section):
    """One input x of the backbone."""

    name: str
    """What targets refer to."""
    view: int = Field(ge=1)
    """Augmented view of the image, from 1."""
    mask: MaskSpec | None = None


class MixSpec(Section):
    """Several images in one input with complementary patch masks (paper, Fig. 2).

    The first input shows the share of patches that its equal part is, the second one what the first left over, and so
    on; all inputs of a mix come from different images of the local batch.
    """

    inputs: list[str] = Field(min_length=2, max_length=4)
    form: Literal["random", "block"] = "random"
    """How patches are dealt to the images."""


class DecoderSpec(Section):
    """The prediction f_ψ. Targets that name the same decoder share its weights."""

    kind: Literal["transformer", "attention_pool", "mean_pool"]
    width: int | None = Field(default=None, ge=8)
    """Hidden size; default: the backbone's."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads; default: one per 64 channels."""
    depth: int = Field(default=4, ge=1)
    """Layers of a Transformer decoder."""
    position: Literal["relative", "absolute"] = "relative"
    """Where a Transformer's queries are: relative to the input view (the paper), or on a fixed grid (MAE)."""

    @model_validator(mode="after")
    def _no_idle_fields(self) -> Self:
        idle = {"mean_pool": {"width", "heads", "depth", "position"}, "attention_pool": {"depth", "position"}}
        found = sorted(self.model_fields_set & idle.get(self.kind, set()))
        if found:
            raise ValueError(f"{', '.join(found)}: no effect on a {self.kind} decoder")
        return self


class MomentumSpec(Section):
    """The exponential moving average that image targets are encoded with."""

    start: float = Field(default=0.995, ge=0, lt=1)
    """m at the first step; rises to `end` with a cosine."""
    end: float = Field(default=1.0, ge=0, le=1)
    projector_depth: int = Field(default=2, ge=0)
    """Residual MLP blocks after the backbone, online and averaged; 0 for none."""


class TargetSpec(Section):
    """One group k of equation (5): a target, its representation, its prediction and its distribution."""

    name: str
    inputs: list[str] = Field(min_length=1)
    """Which inputs predict it; the group's loss is the mean over them."""
    modality: Modality
    view: int | None = Field(default=None, ge=1)
    """Target view of pixels and images."""
    tokens: Literal["masked", "all"] | None = None
    """Where a dense target counts: only on hidden patches, or on all patches of the target view."""
    encoder: Literal["embedding", "text_tower", "patchify", "momentum"]
    decoder: str
    """Name of a decoder of the recipe."""
    distribution: Literal["gaussian", "boltzmann"]
    regularizer: Regularizer
    weight: float = Field(default=1.0, gt=0)
    """w_k of equation (6)."""
    width: int = Field(default=512, ge=8)
    """Dimension of the shared space of a text target."""
    temperature: float = Field(default=0.07, gt=0)
    """First value of the learned temperature of a text target."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Of a category target."""
    normalize_pixels: bool = True
    """Pixels of each patch are standardised (MAE)."""
    sigma2: float = Field(default=0.5, gt=0)
    """Variance of the Gaussian; ½ makes the loss the plain mean squared error."""
    unigrad_lambda: float = Field(default=0.02, ge=0)
    """Strength of the dense UniGrad negative."""


class Recipe(Section):
    """Inputs × targets."""

    name: str
    family: str
    """Row of the paper's table."""
    inputs: list[InputSpec] = Field(min_length=1)
    mix: MixSpec | None = None
    decoders: dict[str, DecoderSpec]
    momentum: MomentumSpec | None = None
    targets: list[TargetSpec] = Field(min_length=1)

    @property
    def views(self) -> int:
        """How many views of an image the loader has to make."""
        wanted = [spec.view for spec in self.inputs] + [target.view or 1 for target in self.targets]
        return max(wanted)

    @property
    def uses_text(self) -> bool:
        """Whether a text tower and captions are needed."""
        return any(target.modality == "text" for target in self.targets)

    @property
    def uses_categories(self) -> bool:
        """Whether label sets are needed."""
        return any(target.modality == "category" for target in self.targets)

    @property
    def uses_momentum(self) -> bool:
        """Whether a momentum copy of the backbone is needed."""
        return any(target.encoder == "momentum" for target in self.targets)

    def input(self, name: str) -> InputSpec:
        """The input of that name."""
        return next(spec for spec in self.inputs if spec.name == name)

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        faults = list(self._faults())
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults(self) -> Iterator[str]:
        names = [spec.name for spec in self.inputs]
        yield from _repeated("input", names)
        yield from _repeated("target", [target.name for target in self.targets])
        yield from self._mix_faults(names)
        if set(range(1, self.views + 1)) - self._views_used():
            yield f"views are numbered from 1 without gaps, but only {sorted(self._views_used())} are used"
        for target in self.targets:
            for fault in self._target_faults(target, names):
                yield f"target '{target.name}': {fault}"
        read = {name for target in self.targets for name in target.inputs}
        for name in names:
            if name not in read:
                yield f"no target is predicted from input '{name}'"
        for name in self.decoders:
            if name not in {target.decoder for target in self.targets}:
                yield f"no target uses decoder '{name}'"
        if self.momentum is not None and not self.uses_momentum:
            yield "`momentum` has no effect: no target has `encoder: momentum`"
        if self.momentum is None and self.uses_momentum:
            yield "a target has `encoder: momentum`, so the recipe needs a `momentum` section"

    def _views_used(self) -> set[int]:
        return {spec.view for spec in self.inputs} | {target.view for target in self.targets if target.view}

    def _mix_faults(self, names: list[str]) -> Iterator[str]:
        if self.mix is None:
            return
        if sorted(self.mix.inputs) != sorted(names):
            yield f"`mix.inputs` {self.mix.inputs} must name every input once; the inputs are {names}"
        if any(spec.mask for spec in self.inputs):
            yield "inputs of a mix have no mask of their own: the mix deals the patches"

    def _target_faults(self, target: TargetSpec, names: list[str]) -> Iterator[str]:
        for name in target.inputs:
            if name not in names:
                yield f"no input '{name}'; {did_you_mean(name, names)}"
                return
        if target.decoder not in self.decoders:
            yield f"no decoder '{target.decoder}'; {did_you_mean(target.decoder, self.decoders)}"
            return
        kind = self.decoders[target.decoder].kind
        modality = target.modality
        if target.encoder not in _ENCODERS[modality]:
            yield f"a {modality} target is encoded by {' or '.join(_ENCODERS[modality])}, not by {target.encoder}"
        if target.distribution != _DISTRIBUTIONS[modality]:
            yield f"a {modality} target has a {_DISTRIBUTIONS[modality]} distribution"
        elif kind not in _DECODERS[target.distribution]:
            valid = " or ".join(_DECODERS[target.distribution])
            yield f"a {target.distribution} target is decoded by {valid}, not {kind}"
        if target.regularizer not in _REGULARIZERS[modality]:
            yield (
                f"regularizer '{target.regularizer}' does not keep a {modality} target from collapsing or has no effect"
                f" on it; valid: {', '.join(_REGULARIZERS[modality])}"
            )
        yield from self._dense_faults(target)
        yield from _idle_settings(target)

    def _dense_faults(self, target: TargetSpec) -> Iterator[str]:
        dense = target.modality in ("pixels", "image")
        if not dense:
            if target.view is not None or target.tokens is not None:
                yield f"`view` and `tokens` have no effect on a {target.modality} target"
            return
        if target.view is None or target.tokens is None:
            yield "a dense target needs `view` and `tokens`"
            return
        specs = [self.input(name) for name in target.inputs]
        if target.tokens == "masked":
            if any(spec.view != target.view for spec in specs):
                yield "`tokens: masked` counts the hidden patches of the input's own view: use `all` between views"
            if self.mix is None and any(spec.mask is None for spec in specs):
                yield "`tokens: masked`, but the input hides no patch"
        if self.decoders[target.decoder].position == "absolute" and any(spec.view != target.view for spec in specs):
            yield "absolute positions do not say where another view lies: use `position: relative`"


def _repeated(what: str, names: list[str]) -> Iterator[str]:
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two {what}s are called '{name}'"


_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "width": ("text",),
    "temperature": ("text",),
    "label_smoothing": ("category",),
    "normalize_pixels": ("pixels",),
    "sigma2": ("pixels", "image"),
    "unigrad_lambda": ("image",),
}


def _idle_settings(target: TargetSpec) -> Iterator[str]:
    for field, modalities in _ONLY_FOR.items():
        if field in target.model_fields_set and target.modality not in modalities:
            yield f"`{field}` has no effect on a {target.modality} target"
    if "unigrad_lambda" in target.model_fields_set and target.regularizer != "unigrad":
        yield "`unigrad_lambda` has no effect without `regularizer: unigrad`"


def parse_recipe(values: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """A checked recipe.

    Raises:
        ConfigError: an unknown key, or inputs and targets that do not hold together.
    """
    if not values:
        raise ConfigError("the run file has no recipe", where=where, fix="extend a built-in one: `extends: m3i`")
    return parse_section(Recipe, values, where=where)


def describe(recipe: Recipe) -> dict[str, Any]:
    """The row of the paper's table that a recipe is, as plain data."""
    return {
        "name": recipe.name,
        "family": recipe.family,
        "inputs": [_describe_input(recipe, spec) for spec in recipe.inputs],
        "targets": [
            {
                "name": target.name,
                "inputs": target.inputs,
                "modality": target.modality,
                "view": target.view,
                "encoder": target.encoder,
                "decoder": recipe.decoders[target.decoder].kind,
                "distribution": target.distribution,
                "regularizer": target.regularizer,
                "weight": target.weight,
            }
            for target in recipe.targets
        ],
    }


def _describe_input(recipe: Recipe, spec: InputSpec) -> dict[str, Any]:
    mask = f"{spec.mask.form} {spec.mask.ratio:g}" if spec.mask else None
    if recipe.mix is not None:
        mask = f"{recipe.mix.form}, complementary"
    return {"name": spec.name, "view": spec.view, "mask": mask, "mixed": recipe.mix is not None}
