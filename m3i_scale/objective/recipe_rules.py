"""Which choices of a recipe hold together: the rows of the paper's table, and what would have no effect or collapse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3i_scale.errors import did_you_mean

if TYPE_CHECKING:
    from m3i_scale.objective.recipe import HeadSpec, InputSpec, Recipe, TargetSpec

_POOLS = ("attention_pool", "mean_pool", "class_token")
_DENSE = ("transformer", "pointwise")
_KINDS = {
    "category": "a category",
    "text": "a text",
    "pixels": "a pixel target",
    "dense": "a dense image target",
    "pooled": "a pooled image target",
}


@dataclass(frozen=True)
class Row:
    """One way to choose encoder, distribution and regulariser for a kind of target."""

    kind: str
    encoders: tuple[str, ...]
    distribution: str
    regularizer: str
    head: bool = False
    prototypes: bool = False

    def __str__(self) -> str:
        return f"{self.distribution} + {self.regularizer} (encoder {' or '.join(self.encoders)})"


ROWS = (
    Row("category", ("embedding",), "boltzmann", "negatives"),
    Row("text", ("text_tower",), "boltzmann", "negatives"),
    Row("text", ("text_tower",), "bernoulli", "negatives"),
    Row("pixels", ("patchify",), "gaussian", "none"),
    Row("dense", ("momentum", "teacher"), "gaussian", "stop_gradient"),
    Row("dense", ("momentum",), "gaussian", "unigrad"),
    Row("dense", ("momentum",), "boltzmann", "negatives", head=True),
    Row("pooled", ("momentum", "online", "teacher"), "gaussian", "stop_gradient", head=True),
    Row("pooled", ("momentum",), "gaussian", "unigrad", head=True),
    Row("pooled", ("online",), "gaussian", "cross_correlation", head=True),
    Row("pooled", ("online",), "gaussian", "variance_covariance", head=True),
    Row("pooled", ("momentum", "online"), "boltzmann", "negatives", head=True),
    Row("pooled", ("momentum",), "boltzmann", "centering", head=True, prototypes=True),
    Row("pooled", ("momentum",), "boltzmann", "mean_entropy", head=True, prototypes=True),
)


def kind_of(target: TargetSpec) -> str:
    """category, text, pixels, or what is predicted of an image: dense or pooled."""
    if target.modality != "image":
        return target.modality
    return "pooled" if target.tokens == "pooled" else "dense"


def row_of(target: TargetSpec) -> Row | None:
    """The row that a target is; None where it is none."""
    wanted = (kind_of(target), target.distribution, target.regularizer)
    for row in ROWS:
        if (row.kind, row.distribution, row.regularizer) == wanted and target.encoder in row.encoders:
            return row
    return None


def faults(recipe: Recipe) -> Iterator[str]:
    """Everything that does not hold together, in words."""
    names = [spec.name for spec in recipe.inputs]
    yield from _repeated("input", names)
    yield from _repeated("target", [target.name for target in recipe.targets])
    yield from _mix_faults(recipe, names)
    yield from _view_faults(recipe)
    for target in recipe.targets:
        for fault in _target_faults(recipe, target, names):
            yield f"target '{target.name}': {fault}"
    yield from _unused(recipe, names)


def _repeated(what: str, names: list[str]) -> Iterator[str]:
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two {what}s are called '{name}'"


def _view_faults(recipe: Recipe) -> Iterator[str]:
    has = {f"target '{target.name}'": target.view for target in recipe.targets if target.view}
    has |= {f"input '{spec.name}'": spec.view for spec in recipe.inputs}
    gap = next((view for view in range(1, recipe.views) if view not in has.values()), None)
    if gap is not None:
        beyond = ", ".join(f"{name} has view {view}" for name, view in has.items() if view > gap)
        yield f"views are numbered from 1 without gaps, but nothing has view {gap}: {beyond}"


def _mix_faults(recipe: Recipe, names: list[str]) -> Iterator[str]:
    if recipe.mix is None:
        return
    if sorted(recipe.mix.inputs) != sorted(names):
        yield f"`mix.inputs` {recipe.mix.inputs} must name every input once; the inputs are {names}"
    if any(spec.mask for spec in recipe.inputs):
        yield "inputs of a mix have no mask of their own: the mix deals the patches"


def _unused(recipe: Recipe, names: list[str]) -> Iterator[str]:
    shown = {recipe.shows(t.view) for t in recipe.targets if t.encoder == "online" and t.view}
    read = {name for target in recipe.targets for name in target.inputs} | shown
    for name in names:
        if name not in read:
            yield f"no target is predicted from input '{name}'"
    for name in recipe.decoders:
        if name not in {target.decoder for target in recipe.targets}:
            yield f"no target uses decoder '{name}'"
    for name, head in recipe.heads.items():
        users = [target for target in recipe.targets if target.head == name]
        if not users:
            yield f"no target uses head '{name}'"
        for fault in _head_faults(head, users):
            yield f"head '{name}': {fault}"
    for section, encoder in ((recipe.momentum, "momentum"), (recipe.teacher, "teacher")):
        wanted = any(target.encoder == encoder for target in recipe.targets)
        if section is not None and not wanted:
            yield f"`{encoder}` has no effect: no target has `encoder: {encoder}`"
        if section is None and wanted:
            fix = ", e.g. recipe.teacher.from_pretrained=/data/models/dinov2-base" if encoder == "teacher" else ""
            yield f"a target has `encoder: {encoder}`, so the recipe needs a `{encoder}` section{fix}"
    yield from _section_faults(recipe)


def _section_faults(recipe: Recipe) -> Iterator[str]:
    momentum = recipe.momentum
    if momentum and momentum.end == 0:
        yield "`momentum.end: 0`: the average would be the model itself"
    if momentum and "projector_depth" in momentum.model_fields_set and not recipe.projects_dense_targets:
        yield "`momentum.projector_depth` has no effect: no dense momentum target goes through it"
    if recipe.balance.kind == "gradient_norm" and len(recipe.targets) == 1:
        yield "`balance: gradient_norm` has no effect on a single target"


def _head_faults(head: HeadSpec, users: list[TargetSpec]) -> Iterator[str]:
    rows = [row for target in users if (row := row_of(target)) is not None]
    if head.prototypes and not any(row.prototypes for row in rows):
        yield "`prototypes` have no effect without `regularizer: centering` or `mean_entropy`"
    if not head.queue and any(row.kind == "dense" for row in rows):
        yield "dense negatives come from a `queue`, e.g. 65536: the patches of a batch would be too many"
    if head.queue and any(target.candidates == "both" for target in users):
        yield "`candidates: both` has no effect beside a `queue`"
    if head.prototypes == 1:
        yield "`prototypes: 1`: all samples would have it"
    if not head.prototypes and any(row.prototypes for row in rows):
        yield "a distribution over prototypes needs `prototypes`, e.g. 4096"
    if head.queue and not any(row.regularizer == "negatives" for row in rows):
        yield "`queue` has no effect without `regularizer: negatives`"
    averaged = any(row.regularizer in ("centering", "unigrad") for row in rows)
    if "state_momentum" in head.model_fields_set and not averaged:
        yield "`state_momentum` has no effect without `regularizer: centering` or `unigrad`"
    if len({(target.pooled, target.regularizer) for target in users}) > 1:
        yield "targets that share a head need one regularizer, and be all dense or all pooled: it remembers one thing"


def _target_faults(recipe: Recipe, target: TargetSpec, names: list[str]) -> Iterator[str]:
    for name in target.inputs:
        if name not in names:
            yield f"no input '{name}'; {did_you_mean(name, names)}"
            return
    if target.decoder not in recipe.decoders:
        yield f"no decoder '{target.decoder}'; {did_you_mean(target.decoder, recipe.decoders)}"
        return
    if target.head is not None and target.head not in recipe.heads:
        yield f"no head '{target.head}'; {did_you_mean(target.head, recipe.heads) if recipe.heads else 'there is none'}"
        return
    row = row_of(target)
    if row is None:
        yield _no_such_row(target)
        return
    kind = recipe.decoders[target.decoder].kind
    valid = _DENSE if row.kind in ("pixels", "dense") else _POOLS
    if row.kind == "dense" and row.head and kind != "pointwise":
        yield f"dense negatives compare backbone tokens: the decoder must be pointwise, not {kind}"
    elif kind not in valid:
        yield f"{_KINDS[row.kind]} is decoded by {' or '.join(valid)}, not {kind}"
    if row.head and target.head is None:
        yield f"{row} needs a `head`"
    if not row.head and target.head is not None:
        yield f"`head` has no effect on {row}"
    yield from _place_faults(recipe, target)
    yield from _collapse_faults(recipe, target)
    yield from _idle_settings(target)


def _no_such_row(target: TargetSpec) -> str:
    kind = kind_of(target)
    rows = [row for row in ROWS if row.kind == kind]
    given = f"{target.distribution} + {target.regularizer} (encoder {target.encoder})"
    encoders = {encoder for row in rows for encoder in row.encoders}
    why = "no row of the table"
    if target.encoder not in encoders:
        why = f"its modality has no such encoder ({' or '.join(sorted(encoders))})"
    elif target.regularizer not in {row.regularizer for row in rows}:
        why = f"'{target.regularizer}' does not keep it from collapsing, or has no effect on it"
    elif target.distribution not in {row.distribution for row in rows if row.regularizer == target.regularizer}:
        why = f"'{target.regularizer}' does not go with a {target.distribution} distribution"
    return f"{_KINDS[kind]} with {given}: {why}; valid: {'; '.join(map(str, rows))}"


def _place_faults(recipe: Recipe, target: TargetSpec) -> Iterator[str]:
    """Where a target lies, and whether its inputs and its decoder can say so."""
    if target.modality in ("category", "text"):
        if target.view is not None or target.tokens is not None:
            yield f"`view` and `tokens` have no effect on {_KINDS[target.modality]}"
        return
    if target.view is None or target.tokens is None:
        yield f"{_KINDS[kind_of(target)]} needs `view` and `tokens`"
        return
    if target.modality == "pixels" and target.tokens == "pooled":
        yield "pixels are dense: `tokens: masked` or `all`"
    specs = [recipe.input(name) for name in target.inputs]
    if target.encoder == "online":
        if recipe.shows(target.view) is None:
            yield f"`encoder: online` needs an input that shows all of view {target.view}, without mask and mix"
        if any(spec.view == target.view for spec in specs):
            yield "an input that shows its own target predicts nothing"
    yield from _dense_place_faults(recipe, target, specs)


def _dense_place_faults(recipe: Recipe, target: TargetSpec, specs: list[InputSpec]) -> Iterator[str]:
    other_view = any(spec.view != target.view for spec in specs)
    if target.tokens == "masked":
        if other_view:
            yield "`tokens: masked` counts the hidden patches of the input's own view: use `all` between views"
        if recipe.mix is None and any(spec.mask is None for spec in specs):
            yield "`tokens: masked`, but the input hides no patch"
    decoder = recipe.decoders[target.decoder]
    if decoder.kind == "transformer" and decoder.position == "absolute" and other_view:
        yield "absolute positions do not say where another view lies: use `position: relative`"
    if decoder.kind == "pointwise":
        if target.tokens == "masked" or recipe.mix is not None or any(spec.mask for spec in specs):
            yield "a pointwise decoder has no answer for patches that its input hides: use a transformer"
        if other_view and target.match == "position":
            yield "a pointwise decoder knows its own view alone: use a transformer, or `match: similarity`"
        if not other_view and target.match == "similarity":
            yield "`match: similarity` has no effect within one view"


def _collapse_faults(recipe: Recipe, target: TargetSpec) -> Iterator[str]:
    """Learned targets without anything that keeps them apart."""
    learned = target.encoder in ("momentum", "online")
    if target.pooled and target.regularizer == "stop_gradient" and learned:
        head = recipe.heads.get(target.head or "")
        if head is not None and not head.predictor_depth:
            yield "a stop gradient alone lets a pooled target collapse: give its head a predictor, `predictor_depth: 2`"
    specs = [recipe.input(name) for name in target.inputs]
    shown = recipe.mix is None and any(spec.view == target.view and spec.mask is None for spec in specs)
    if target.encoder == "momentum" and shown and target.regularizer != "centering":
        yield "a backbone that sees all of the target need only copy its own average: hide patches, take another view"
    if target.regularizer == "unigrad" and target.unigrad_lambda == 0:
        yield "`unigrad_lambda: 0` keeps nothing apart: choose `regularizer: stop_gradient`, or a larger one"
    if target.regularizer == "centering" and target.target_temperature >= target.temperature:
        yield "`target_temperature` must be below `temperature`: a target that is not sharper becomes uniform"
    if target.regularizer == "mean_entropy" and target.target_temperature >= 1:
        yield "`target_temperature` must be below 1: it sharpens the target"


_Applies = Callable[["TargetSpec"], bool]


def _has_temperature(target: TargetSpec) -> bool:
    return target.modality in ("text", "image") and target.distribution != "gaussian"


_ONLY_FOR: dict[str, tuple[str, _Applies]] = {
    "width": ("text targets", lambda t: t.modality == "text"),
    "direction": ("Boltzmann text targets", lambda t: t.modality == "text" and t.distribution == "boltzmann"),
    "temperature": ("softmax or sigmoid over samples or prototypes", _has_temperature),
    "bias": ("Bernoulli targets", lambda t: t.distribution == "bernoulli"),
    "target_temperature": ("distributions over prototypes", lambda t: t.regularizer in ("centering", "mean_entropy")),
    "label_smoothing": ("category targets", lambda t: t.modality == "category"),
    "normalize_pixels": ("pixels", lambda t: t.modality == "pixels"),
    "sigma2": ("Gaussians", lambda t: t.distribution == "gaussian" and t.regularizer != "cross_correlation"),
    "unigrad_lambda": ("`regularizer: unigrad`", lambda t: t.regularizer == "unigrad"),
    "entropy_weight": ("`regularizer: mean_entropy`", lambda t: t.regularizer == "mean_entropy"),
    "offdiagonal_weight": ("`regularizer: cross_correlation`", lambda t: t.regularizer == "cross_correlation"),
    "variance_weight": ("`regularizer: variance_covariance`", lambda t: t.regularizer == "variance_covariance"),
    "covariance_weight": ("`regularizer: variance_covariance`", lambda t: t.regularizer == "variance_covariance"),
    "candidates": ("negatives of pooled image targets", lambda t: t.pooled and t.regularizer == "negatives"),
    "match": ("dense negatives", lambda t: t.dense and t.regularizer == "negatives"),
}


def _idle_settings(target: TargetSpec) -> Iterator[str]:
    for field, (where, applies) in _ONLY_FOR.items():
        if field in target.model_fields_set and not applies(target):
            yield f"`{field}` has no effect here: it is for {where}"
