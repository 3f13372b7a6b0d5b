"""Describe a recipe, inputs × targets, as data.

Every approach of the paper's table is one choice of the input x = t_x(s), the target y = t_y(s), its representation z_y
= f_φ(y), the prediction ẑ_y = f_ψ(z_x), the distribution P̂ and the collapse prevention of z_y. Nothing in this package
branches on the name of a method. Targets, distributions and regularizers are classes, found by `kind`; user-defined
ones may be outside the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import dropwhile
from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from m3i_scale.config import RunConfig, find_run_file, load_run, parse_section, run_values
from m3i_scale.config.data import Reads
from m3i_scale.config.explain import WhereOf, origin
from m3i_scale.config.views import ViewSpec, ViewSpecs, each_view
from m3i_scale.errors import ConfigError, ErrorCollector
from m3i_scale.objective.balance import BalanceSpec, FixedSpec
from m3i_scale.objective.decoders import ClassTokenSpec, MeanPoolSpec, SiameseSpec
from m3i_scale.objective.encoders import EmaSpec
from m3i_scale.objective.inputs import InputSpec
from m3i_scale.objective.targets.base import HeadTarget, ImageTarget, Parts, Target
from m3i_scale.objective.targets.dense import Dense
from m3i_scale.upgrade import upgrade_recipe


class Recipe(Parts):
    """A pre-training method: its inputs, its targets (loss terms), and their shared parts."""

    name: str
    """Name of the method."""
    family: str
    """Row of the paper's table."""
    ema: EmaSpec | None = None
    """EMA teacher, for targets with `encoder: ema`."""
    balance: BalanceSpec = FixedSpec()
    """Loss weighting."""
    views: list[ViewSpec] | None = Field(default=None, min_length=1)
    """The views of an image by role, numbered from 1. Default: identical views, in the number that is used."""
    targets: list[Target] = Field(min_length=1)
    """Loss terms."""

    @property
    def image_targets(self) -> list[ImageTarget]:
        """Return the targets that are views of the image."""
        return [target for target in self.targets if isinstance(target, ImageTarget)]

    @property
    def head_targets(self) -> list[HeadTarget]:
        """Return the targets that use a projection head of the recipe."""
        return [target for target in self.targets if isinstance(target, HeadTarget)]

    @property
    def view_count(self) -> int:
        """Return the number of views per image that inputs and targets use."""
        return max([spec.seen[-1] for spec in self.inputs] + [target.view for target in self.image_targets])

    @property
    def drawn_views(self) -> ViewSpecs:
        """Return the views of an image that the data loader has to create."""
        return self.view_count if self.views is None else self.views

    def is_small(self, view: int) -> bool:
        each = each_view(self.drawn_views)
        return view <= len(each) and each[view - 1].size is not None

    @property
    def uses_mask_tokens(self) -> bool:
        """Return whether an input replaces its masked patches by mask tokens."""
        return any(spec.mask is not None and spec.mask.masked == "mask_token" for spec in self.inputs)

    @property
    def uses_text(self) -> bool:
        """Return whether captions and their tokenizer are needed."""
        return self.uses_text_tower or self.predicts_captions

    @property
    def uses_text_tower(self) -> bool:
        """Return whether the text tower encodes captions into one vector each."""
        return any(target.modality == "text" for target in self.targets)

    @property
    def predicts_captions(self) -> bool:
        """Return whether captions are predicted token by token."""
        return any(target.by_token for target in self.targets)

    @property
    def uses_categories(self) -> bool:
        """Return whether label sets are needed."""
        return any(target.modality == "category" for target in self.targets)

    @property
    def labels_file(self) -> str | None:
        """Return the sidecar file of the shards that names the predicted classes, or None if there are none."""
        return next((target.labels_file for target in self.targets if target.labels_file is not None), None)

    @property
    def reads(self) -> Reads:
        """Return the annotations that the data loader has to read in addition to image and caption."""
        return next((target.reads for target in self.targets if target.reads != "labels"), "labels")

    @property
    def reads_masks(self) -> bool:
        """Return whether the data loader has to read segmentation masks."""
        return self.reads == "masks"

    @property
    def projects_dense_targets(self) -> bool:
        """Return whether a dense EMA target without a head uses the residual projector."""
        return any(isinstance(target, Dense) and target.projected for target in self.targets)

    @property
    def averaged_layers(self) -> int:
        """Return the largest number of last layers that a target averages."""
        return max((target.layers for target in self.targets if isinstance(target, Dense)), default=1)

    @property
    def has_image_level(self) -> bool:
        """Return whether a target is image-level (see `Target.is_image_level`)."""
        return any(target.is_image_level for target in self.targets)

    @property
    def compares_samples(self) -> str | None:
        """Return which part of the recipe needs two samples or more per global micro-batch, or None."""
        for name, head in self.heads.items():
            if "batch" in (head.norm, head.output_norm):
                return f"head '{name}' has batch norm"
        if self.normalizes_tokens is not None:
            return self.normalizes_tokens
        for target in self.targets:
            if target.compares_samples:
                return f"target '{target.name}' compares the samples of a micro-batch"
        return None

    @property
    def reads_before_norm(self) -> bool:
        """Return whether a part reads tokens before the final norm of the backbone."""
        pools = any(isinstance(decoder, MeanPoolSpec) and not decoder.final_norm for decoder in self.decoders.values())
        return pools or (self.ema is not None and self.ema.projector == "transformer")

    @property
    def uses_final_norm(self) -> bool:
        """Return whether a target reads tokens after the final norm of the backbone."""
        decoders = [self.decoders[target.decoder] for target in self.targets if target.is_image_level]
        return not self.reads_before_norm or any(getattr(decoder, "final_norm", True) for decoder in decoders)

    @property
    def normalizes_tokens(self) -> str | None:
        """Return which part of the recipe has batch norm over tokens, or None."""
        if self.ema is not None and self.ema.projector == "transformer":
            return "the projector has batch norm"
        siamese = [name for name, decoder in self.decoders.items() if isinstance(decoder, SiameseSpec)]
        return f"decoder '{siamese[0]}' has batch norm" if siamese else None

    @property
    def uses_batch_statistics(self) -> bool:
        """Return whether a loss depends on the batch in which a sample is: other samples, statistics, or a memory."""
        statistics = any(target.has_statistics for target in self.targets)
        return statistics or self.compares_samples is not None or any(t.regularizer.memory_fields for t in self.targets)

    def summary(self) -> dict[str, Any]:
        """Return the recipe as a row of the paper's table: inputs and targets as plain data."""
        return {
            "name": self.name,
            "family": self.family,
            "inputs": [self._input_summary(spec) for spec in self.inputs],
            "targets": [target.summary() | {"decoder": self.decoders[target.decoder].kind} for target in self.targets],
            "balance": self.balance.kind,
        }

    def _input_summary(self, spec: InputSpec) -> dict[str, Any]:
        mask = f"{spec.mask.form.kind} {spec.mask.amount}" if spec.mask else None
        if self.mix is not None:
            mask = f"{self.mix.form.kind}, complementary"
        summary = {"name": spec.name, "view": spec.view, "mask": mask, "mixed": self.mix is not None}
        return summary | ({"views": spec.views} if spec.views > 1 else {})

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        errors = list(self._errors())
        if errors:
            raise ValueError("; ".join(errors))
        return self

    def _errors(self) -> Iterator[str]:
        names = [spec.name for spec in self.inputs]
        yield from _repeated("input", names)
        yield from _repeated("target", [target.name for target in self.targets])
        yield from self._mix_errors(names)
        yield from self._view_errors()
        for target in self.targets:
            for error in target.errors(self):
                yield f"target '{target.name}': {error}"
            if target.reads != "labels" and len(self.targets) > 1:
                yield f"target '{target.name}': a {target.kind} target is the only one of its recipe"
        only_full = len(self.inputs) == self.inputs[0].views == 1 and self.shows(1) is not None
        for name, decoder in self.decoders.items():
            if isinstance(decoder, ClassTokenSpec) and not decoder.alone and (self.image_targets or not only_full):
                yield (
                    f"decoder '{name}': more than the class token is read of the only input, which shows all of view "
                    "1, and by targets that lie in no view"
                )
        yield from self._unused(names)
        yield from self._head_errors()
        yield from self._section_errors()

    def _mix_errors(self, names: list[str]) -> Iterator[str]:
        if self.mix is None:
            return
        if sorted(self.mix.inputs) != sorted(names):
            yield f"`mix.inputs` {self.mix.inputs} must name every input once; the inputs are {names}"
        if any(spec.mask for spec in self.inputs):
            yield "inputs of a mix have no mask of their own: the mix deals the patches"
        if any(spec.views > 1 or self.is_small(spec.view) for spec in self.inputs):
            yield "inputs of a mix are of one view each, of the backbone's size"

    def _view_errors(self) -> Iterator[str]:
        has = {f"target '{target.name}'": [target.view] for target in self.image_targets}
        has |= {f"input '{spec.name}'": [*spec.seen] for spec in self.inputs}
        used = {view for views in has.values() for view in views}
        there = len(each_view(self.drawn_views))
        gap = next((view for view in range(1, there) if view not in used), None)
        beyond = ", ".join(
            f"{name} has view {max(views)}" for name, views in has.items() if max(views) > (gap or there)
        )
        if gap is not None:
            beyond = beyond or f"there are {there}"
            yield f"views are numbered from 1 without gaps, but nothing has view {gap}: {beyond}"
        elif self.view_count != there:
            yield f"`views` are {there}: {beyond or f'nothing has view {there}'}"
        sizes = [spec.size for spec in self.views or []]
        small = list(dropwhile(lambda size: size is None, sizes))
        if len(small) == len(sizes) > 0 or len(set(small)) > 1:
            yield "`views` have the backbone's size, and the last of them may have one other `size`"
        for spec in self.inputs:
            if spec.mask is not None and any(map(self.is_small, spec.seen)):
                yield f"input '{spec.name}': a small view is shown whole, without a mask"

    def _unused(self, names: list[str]) -> Iterator[str]:
        shown = {self.shows(target.view) for target in self.image_targets if target.encoder == "online"}
        read = {name for target in self.targets for name in target.inputs} | shown
        for name in names:
            if name not in read:
                yield f"no target is predicted from input '{name}'"
        for name in self.decoders:
            if name not in {target.decoder for target in self.targets}:
                yield f"no target uses decoder '{name}'"
        for name in self.heads:
            if name not in {target.head for target in self.head_targets}:
                yield f"no target uses head '{name}'"
        for name in self.teachers:
            if name not in {target.teacher for target in self.image_targets if target.encoder == "teacher"}:
                yield f"teacher '{name}' has no effect: no target has `encoder: teacher, teacher: {name}`"

    def _head_errors(self) -> Iterator[str]:
        for name in dict.fromkeys(target.memory_name for target in self.head_targets):
            users = [target for target in self.head_targets if target.memory_name == name]
            if any(user.remembers != users[0].remembers for user in users):
                sharing = ", ".join(user.name for user in users)
                yield (
                    f"head '{users[0].head}': the targets that share it ({sharing}) need one kind, and "
                    "one regularizer that remembers alike, since the head has one memory: change all of them, or give "
                    "each a head of its own"
                )

    def _section_errors(self) -> Iterator[str]:
        averages = any(target.encoder == "ema" for target in self.targets)
        if self.ema is not None and not averages:
            yield "`ema` has no effect: no target has `encoder: ema`"
        yield from self._norm_errors()
        siamese = [name for name, decoder in self.decoders.items() if isinstance(decoder, SiameseSpec)]
        if siamese and (self.ema is None or self.ema.projector != "transformer"):
            yield f"decoder '{siamese[0]}' of kind siamese needs `ema.projector: transformer`, which embeds its tokens"
        if self.ema is None and averages:
            yield "a target has `encoder: ema`, so the recipe needs an `ema` section"
        if all(target.collapses_alone for target in self.targets):
            yield (
                f"nothing keeps '{self.targets[0].name}' from collapsing: a {self.targets[0].kind} target with "
                f"`encoder: {self.targets[0].encoder}` needs another target beside it, or `encoder: teacher`"
            )
        if self.balance.module.needs_gradients and len(self.targets) == 1:
            yield f"`balance: {self.balance.kind}` has no effect on a single target"

    def _norm_errors(self) -> Iterator[str]:
        """Yield targets that need the final norm. `Encoded.pooled` applies it; SIM's projector needs none."""
        if not self.reads_before_norm:
            return
        what, supported, fix = "`final_norm: false` of a decoder", "text, categories and spread", "`final_norm: true`"
        projects = self.ema is not None and self.ema.projector == "transformer"
        if projects:
            what, fix = "`ema.projector: transformer`", "`projector: mlp`"
            supported = f"dense targets with `encoder: ema`, {supported}"
        for name, spec in self.decoders.items():
            if isinstance(spec, ClassTokenSpec) and spec.blocks > 1:
                yield f"{what} cannot be combined with decoder '{name}', which reads several layers: use {fix}"
        for item in self.targets:
            projected = projects and isinstance(item, Dense) and item.projected
            if not projected and (isinstance(item, ImageTarget) or not item.is_image_level):
                yield f"{what} supports {supported}, got {item.title} '{item.name}': use {fix}"


def _repeated(what: str, names: list[str]) -> Iterator[str]:
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two {what}s are called '{name}'"


def without_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without the paths of its teachers, which differ between machines."""
    recipe = upgrade_recipe(recipe)
    for teacher in recipe.get("teachers", {}).values():
        teacher["from_pretrained"] = ""
    return recipe


def meaning(values: Any) -> Any:
    """Return the canonical form of a recipe: all of its fields, including defaults, as JSON values without paths of
    teachers. An invalid recipe is returned unchanged."""
    if not isinstance(values, dict):
        return values
    try:
        return parse_recipe(values).model_dump(mode="json", exclude={"teachers"})
    except ConfigError:
        return values


def parse_recipe(values: dict[str, Any], *, where: str | WhereOf = "recipe", imports: bool = False) -> Recipe:
    """Validate a recipe. Older names of its keys are upgraded.

    Args:
        values: the recipe as read from a file.
        where: location for error messages, or a function that returns the location of a key below the recipe.
        imports: whether to import the modules of user-defined classes, which runs their code. Only for config files
            that the user names. Recipes in checkpoints and exports may come from somebody else.
    """
    if not values:
        place = where(()) if callable(where) else where
        raise ConfigError("the config file has no recipe", where=place, fix="extend a built-in one: `extends: m3i`")
    return parse_section(Recipe, upgrade_recipe(values), where=where, below="recipe", imports=imports)


def load_run_and_recipe(
    name_or_path: str, overrides: list[str] | None = None, values: dict[str, Any] | None = None
) -> tuple[RunConfig, Recipe]:
    """Load a config file and its recipe; for the arguments see `load_run`. Imports user-defined classes that the recipe
    names, which runs their code."""
    if values is None:
        values = run_values(name_or_path, overrides)
    errors, recipe = ErrorCollector(), None
    run = errors.collect(load_run, name_or_path, overrides, values)
    described = values.get("recipe")
    if run is not None and run.task is not None:
        recipe = parse_recipe(run.recipe)
    elif isinstance(described, dict):  # otherwise `errors` already reports the missing recipe
        path = find_run_file(name_or_path)
        recipe = errors.collect(
            lambda: parse_recipe(
                described, where=lambda place: origin(("recipe", *place), overrides or [], path), imports=True
            )
        )
    errors.raise_any()
    if run is None or recipe is None:
        raise RuntimeError("there is no error, and nothing was loaded")
    return run, recipe
