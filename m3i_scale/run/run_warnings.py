"""Warnings about a run: settings that are probably mistakes, images unlike those of its pretrained weights, and shards
that are used twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryFile

from m3i_scale.backbones.build import backbone_source
from m3i_scale.backbones.families import family_of
from m3i_scale.config import DatasetConfig, DistortionConfig, RunConfig, load_run
from m3i_scale.config.data import AugmentConfig
from m3i_scale.config.files import values_beyond_built_in
from m3i_scale.config.run_control import PROBES
from m3i_scale.config.views import ViewSpec, each_view
from m3i_scale.data.remote.access import Access, check_access, is_remote
from m3i_scale.data.shards import expand_shards, read_sample_count
from m3i_scale.errors import ErrorCollector, UserError
from m3i_scale.objective.recipe import Recipe, parse_recipe
from m3i_scale.objective.schedule import values_of
from m3i_scale.objective.targets.patches import ShownPatches

MAX_EPOCHS, USUAL_EPOCHS = 2_000, 300
"""Epochs per dataset above which a run is probably a mistake, and the number that is recommended instead."""


def repeated_overrides(overrides: Sequence[str]) -> list[str]:
    """Return warnings about keys that a command line sets more than once."""
    keys = [override.partition("=")[0] for override in overrides]
    return [
        f"{key} is set {keys.count(key)} times on the command line, and the last value counts. Fix: leave one of them"
        for key in dict.fromkeys(keys)
        if keys.count(key) > 1
    ]


def command_warnings(run: RunConfig, name_or_path: str, overrides: Sequence[str]) -> list[str]:
    """Return warnings about a command line and the files that it names; `run` is the result of `load_run` for them."""
    return [*repeated_overrides(overrides), *_unscaled_rate(run, name_or_path, overrides)]


def _unscaled_rate(run: RunConfig, name_or_path: str, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a warning if the learning rate of a built-in config is used with another batch size."""
    name, changes = values_beyond_built_in(name_or_path, overrides)
    optim = changes.get("optim")
    if name is None or not isinstance(optim, dict) or "batch_size" not in optim or "lr" in optim:
        return
    usual, now = load_run(name).optim, run.optim
    if usual.batch_size != now.batch_size:
        ratio = now.batch_size / usual.batch_size
        root, linear = now.lr * ratio**0.5, now.lr * ratio  # of a protocol, lr may follow the backbone's width
        yield (
            f"optim.lr is {now.lr:g}, the value of {name} for optim.batch_size={usual.batch_size}, and this run has "
            f"optim.batch_size={now.batch_size}. Fix: optim.lr={root:.3g} (square root) or {linear:.3g} (linear), "
            "or set the present value"
        )


def warnings_of(
    name_or_path: str,
    overrides: list[str] | None = None,
    *,
    ask_servers: bool = True,
    unpacked: Mapping[str, int] | None = None,
) -> list[str]:
    """Return warnings about a config file, or [] if it cannot be read. `ask_servers` lists remote shards. Pass False if
    the run has errors, e.g. an unreachable server. For `unpacked`, see `manifest_counts`."""
    try:
        run = load_run(name_or_path, overrides)
    except UserError:  # reported by `errors_of`
        return []
    warnings = command_warnings(run, name_or_path, overrides or []) + _output_warnings(run)
    return warnings + run_warnings(run, ask_servers=ask_servers, unpacked=unpacked)


def _output_warnings(run: RunConfig) -> list[str]:
    """Return a warning if this machine, which may not be of the run, cannot create files in the output directory."""
    above = run.output_dir
    try:
        above = next(path for path in (run.output_dir, *run.output_dir.parents) if path.exists())
        TemporaryFile(dir=above).close()  # `os.access` approves /proc for root
    except OSError as error:
        why = f"no file can be created in '{above.absolute()}' on this machine: {error.strerror}"
        return [f"output_dir: {why}. Fix: make it writable"]
    return []


def run_warnings(
    run: RunConfig, *, ranks: int = 1, ask_servers: bool = True, unpacked: Mapping[str, int] | None = None
) -> list[str]:
    """Return warnings about a run whose recipe, weights and data may have errors, which are reported elsewhere. `ranks`
    is their smallest possible number. See `warnings_of` for the other arguments."""
    errors = ErrorCollector()
    recipe = errors.collect(parse_recipe, run.recipe)
    access = errors.collect(lambda: check_access(run.data, run.data.datasets).at_start()) if ask_servers else None
    warnings = [] if recipe is None else [*config_warnings(run, recipe, ranks)]
    warnings += errors.collect(lambda: [*_image_warnings(run)]) or []
    return [*warnings, *_epoch_warnings(run, manifest_counts(run, access, unpacked)), *_source_warnings(run, access)]


def config_warnings(run: RunConfig, recipe: Recipe, ranks: int = 1) -> Iterator[str]:
    """Yield warnings about valid settings that are probably mistakes: they have no effect, or an unintended one (wrong
    unit). A setting that cannot work is an error instead."""
    yield from _learning_rate(run)
    yield from _contrastive_batch(run, recipe, ranks)
    yield from _temperatures(recipe)
    yield from _augmentation(run, recipe)
    if run.backbone.from_pretrained is not None and run.backbone.weight_init != "default":
        yield (
            "backbone.weight_init has no effect: the weights are those of backbone.from_pretrained. Fix: "
            "backbone.weight_init=default"
        )
    if "all" in run.backbone.freeze:
        for target in recipe.targets:
            if isinstance(target, ShownPatches):
                yield f"target {target.name} has no effect: the backbone is frozen. Fix: use a recipe without it"
        if run.optim.layer_decay != 1:
            yield "optim.layer_decay has no effect: the backbone is frozen. Fix: optim.layer_decay=1"
    if run.optim.trust_coefficient is not None and run.optim.clip_grad_norm:
        yield (
            "optim.clip_grad_norm has no effect on matrices, whose gradients trust_coefficient scales. Fix: "
            "optim.clip_grad_norm=0"
        )
    if run.data.validation and not run.evaluation.every_steps and not run.log.pictures_every_steps:
        yield "data.validation has no effect: evaluation.every_steps is 0. Fix: evaluation.every_steps=1000"
    online = run.evaluation.online
    if online is not None and online.train_data is not None and not {*(online.metrics or PROBES)}.intersection(PROBES):
        yield "evaluation.online.train_data has no effect: `metrics` has no knn and no linear. Fix: leave it out"


def _learning_rate(run: RunConfig) -> Iterator[str]:
    optim, dense = run.optim, run.task is not None and run.task.dense
    # An eps far above the second moment turns AdamW into SGD, which has other learning rates.
    computes_sgd = not optim.momentum_correction and optim.eps >= 1
    if not computes_sgd and (optim.lr >= 1 or (dense and optim.lr >= 0.01)):
        yield (
            f"optim.lr is {optim.lr:g}: the optimizer is AdamW, which moves each weight by about lr per step, and not "
            f"SGD. Fix: optim.lr={'1e-4' if dense else '1e-3'}"
        )


def _contrastive_batch(run: RunConfig, recipe: Recipe, ranks: int) -> Iterator[str]:
    if run.optim.contrastive_batch == "micro" or run.task is not None:
        return
    stages = [run.in_stage(number).optim.micro_batch_size for number in range(len(run.stage_starts))]
    if not recipe.uses_batch_statistics:
        yield "optim.contrastive_batch has no effect: no loss compares samples of a batch. Fix: leave it out"
    elif min(stages) * ranks >= run.optim.batch_size:
        yield (
            f"optim.contrastive_batch has no effect: optim.micro_batch_size={min(stages)} is the batch size of a rank, "
            "so that there is no gradient accumulation. Fix: leave it out, or lower optim.micro_batch_size"
        )


def _temperatures(recipe: Recipe) -> Iterator[str]:
    for number, target in enumerate(recipe.targets):
        for section in ("distribution", "regularizer"):
            for name, value in getattr(target, section):
                if name.endswith("temperature") and (most := max(values_of(value))) > 1:
                    yield (
                        f"recipe.targets.{number}.{section}.{name} is {most:g}: it divides cosines, so that the "
                        f"softmax is nearly uniform. Fix: {1 / most:.2g} if this is a scale, which multiplies them"
                    )


def _augmentation(run: RunConfig, recipe: Recipe) -> Iterator[str]:
    views = each_view(recipe.drawn_views)
    usual = AugmentConfig()
    named: list[tuple[str, DistortionConfig]] = [("data.augment", run.data.augment)]
    named += [
        (f"data.datasets.{name}.augment", source.augment)
        for name, source in run.data.datasets.items()
        if source.augment is not None
    ]
    for place, augment in named:
        for name in DistortionConfig.model_fields:
            if name not in ViewSpec.model_fields:
                continue
            changed = getattr(augment, name) != getattr(usual, name)
            if changed and all(getattr(view, name) is not None for view in views):
                yield _overridden(f"{place}.{name}")
        if augment.scale_jitter is not None and all(view.crop_scale or view.crop_ratio for view in views):
            yield _overridden(f"{place}.scale_jitter")
        for_views = [view.color_jitter_p for view in views]
        probabilities = [augment.color_jitter_p if chosen is None else chosen for chosen in for_views]
        if augment.color_jitter != usual.color_jitter and not any(probabilities):
            yield (
                f"{place}.color_jitter has no effect: color_jitter_p is 0. Fix: {place}.color_jitter_p=0.8, or leave "
                "it out"
            )


def _overridden(key: str) -> str:
    return f"{key} has no effect: each of recipe.views has its own. Fix: leave one of them out"


def _image_warnings(run: RunConfig) -> Iterator[str]:
    """Yield warnings about image settings that differ from the pretrained weights, which is often a mistake."""
    if run.backbone.from_pretrained is None:
        return
    source = backbone_source(run.backbone)
    trained, now = source.normalisation, {key: list(getattr(run.data.augment, key)) for key in ("mean", "std")}
    if trained and trained != now:
        yield (
            f"the pretrained weights use images with mean {trained['mean']} and std {trained['std']}, and this run "
            f"uses {now['mean']} and {now['std']}: data.augment.mean, data.augment.std"
        )
    if family_of(source.config).positions is None:  # without position embeddings, any size fits
        return
    image_size = source.config.image_size
    size = run.backbone.config.get("image_size", image_size)
    stages = (run.in_stage(number) for number in range(len(run.stage_starts)))
    others = {stage.image_size(size) for stage in stages} - {image_size}
    if others:
        yield (
            f"the pretrained weights use images of {image_size} pixels, and this run uses "
            f"{', '.join(map(str, sorted(others)))} (backbone.config.image_size, stages); position embeddings "
            "are resized"
        )


def manifest_counts(
    run: RunConfig, access: Access | None = None, unpacked: Mapping[str, int] | None = None
) -> dict[str, int | None]:
    """Return the number of samples by dataset; None without a manifest.json. Without `access`, remote servers are not
    contacted. `unpacked` are the numbers of images of datasets that are not in shards yet, by path."""

    def count(path: str) -> int | None:
        if unpacked and path in unpacked:
            return unpacked[path]
        return None if access is None and is_remote(path) else read_sample_count(path, "samples", access)

    return {name: count(source.path) for name, source in run.data.datasets.items()}


def _epoch_warnings(run: RunConfig, counts: Mapping[str, int | None]) -> Iterator[str]:
    """Yield a warning for each dataset with too many epochs, except datasets with a limit or a scheduled weight."""
    sources, optim = run.data.datasets, run.optim
    weights = {name: source.weight for name, source in sources.items()}
    if any(isinstance(weight, list) for weight in weights.values()):
        return
    total = sum(weight for weight in weights.values() if not isinstance(weight, list))
    for name, count in counts.items():
        weight = weights[name]
        if not count or sources[name].epochs is not None or isinstance(weight, list) or not total:
            continue
        per_step = optim.batch_size * weight / total
        epochs = optim.steps * per_step / count
        if epochs > MAX_EPOCHS:
            steps = max(round(USUAL_EPOCHS * count / per_step), 1)
            fix = f"optim.steps={steps} for {USUAL_EPOCHS} epochs"
            if optim.warmup_steps >= steps:
                fix += f", with optim.warmup_steps={steps // 10}"
            yield (
                f"data.datasets.{name}: the run uses each of the {count:,} images {epochs:,.0f} times (epochs). "
                f"Fix: {fix}, or more images"
            )


def _source_warnings(run: RunConfig, access: Access | None) -> Iterator[str]:
    """Yield warnings about the datasets of a run. Datasets that cannot be listed are reported as errors elsewhere.
    Without `access`, remote servers are not contacted."""
    online = run.evaluation.online
    if len(run.data.datasets) + len(run.data.validation) + (online is not None) < 2:
        return
    shards_of = {f"data.datasets.{name}": _listed(source, access) for name, source in run.data.datasets.items()}
    held_out = {f"data.validation.{name}": _listed(source, access) for name, source in run.data.validation.items()}
    if online is not None:
        held_out["evaluation.online.data"] = _listed(DatasetConfig(path=online.data), access)
    pairs = [*combinations(shards_of.items(), 2)]
    pairs += [(train, val) for train in shards_of.items() for val in held_out.items()]
    for (one, first), (other, second) in pairs:
        common = first & second
        if common:
            why = "so its metrics are those of training data" if other in held_out else "so they count twice"
            yield (
                f"{len(common)} of the {len(second)} shards of {other} are also shards of {one}, {why}. Fix: give it "
                "other shards"
            )


def _listed(source: DatasetConfig, access: Access | None) -> frozenset[str]:
    """Return the shards of a dataset in comparable form; empty if they cannot be listed."""
    if access is None and is_remote(source.path):
        return frozenset()
    try:
        shards = expand_shards(source.path, access=access)
    except (UserError, OSError):
        return frozenset()
    return frozenset(str(shard.resolve()) if isinstance(shard, Path) else str(shard) for shard in shards)
