"""Warnings about a run: about its config file, images unlike those of its pretrained weights, and data that is read too
often."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from pathlib import Path

from m3i_scale.backbones.build import backbone_source
from m3i_scale.backbones.families import family_of
from m3i_scale.config import DatasetConfig, RunConfig, run_values, valid_part
from m3i_scale.data.remote.access import Access, check_access
from m3i_scale.data.remote.address import is_remote
from m3i_scale.data.shards import expand_shards, read_sample_count
from m3i_scale.errors import Faults, UserError
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.config_warnings import config_warnings

MOST_EPOCHS = 1600
"""Longest published training of a built-in recipe (MAE, SIM), in epochs."""


def repeated_overrides(overrides: Sequence[str]) -> list[str]:
    """Return warnings about keys that a command line sets more than once."""
    keys = [override.partition("=")[0] for override in overrides]
    return [
        f"{key} is set {keys.count(key)} times on the command line, and the last value counts. Fix: leave one of them"
        for key in dict.fromkeys(keys)
        if keys.count(key) > 1
    ]


def warnings_of(
    name_or_path: str, overrides: list[str] | None = None, ranks: int | None = None, *, ask_servers: bool = True
) -> list[str]:
    """Return warnings about a config file. If it has errors, only warn about the valid values. `ask_servers` reads the
    manifests of remote shards. Pass False if the run has errors, e.g. an unreachable server."""
    try:
        values = run_values(name_or_path, overrides)
    except UserError:  # reported by `faults_of`
        return []
    run, faulty = valid_part(values)
    warnings = repeated_overrides(overrides or [])
    return warnings if run is None else warnings + run_warnings(run, ranks, faulty, ask_servers=ask_servers)


def run_warnings(
    run: RunConfig, ranks: int | None, faulty: Collection[str] = (), *, ask_servers: bool = True
) -> list[str]:
    """Return warnings about a run, which has default values in place of values with errors. `faulty` has their dotted
    keys. See `warnings_of` for `ask_servers`."""
    errors = Faults()
    recipe = errors.note(parse_recipe, run.recipe)
    access = errors.note(lambda: check_access(run.data, run.data.datasets).at_start()) if ask_servers else None
    warnings = config_warnings(run, recipe, faulty)
    warnings += errors.note(lambda: [*_image_warnings(run)]) or []
    return [*warnings, *_source_warnings(run, ranks, access)]


def _image_warnings(run: RunConfig) -> Iterator[str]:
    """Yield warnings about image settings that differ from the pretrained weights, which is often a mistake."""
    if run.backbone.from_pretrained is None:
        return
    source = backbone_source(run.backbone)
    trained, now = source.normalisation, {key: list(getattr(run.data.augment, key)) for key in ("mean", "std")}
    if trained and trained != now:
        yield (
            f"the weights were trained on images with mean {trained['mean']} and std {trained['std']}, and "
            f"this run takes {now['mean']} and {now['std']}: data.augment.mean, data.augment.std"
        )
    if family_of(source.config).positions is None:  # without position embeddings, any size fits
        return
    image_size = source.config.image_size
    size = run.backbone.config.get("image_size", image_size)
    stages = (run.in_stage(number) for number in range(len(run.stage_starts)))
    others = {stage.image_size(size) for stage in stages} - {image_size}
    if others:
        yield (
            f"the weights are for images of {image_size} pixels, and this run takes "
            f"{', '.join(map(str, sorted(others)))}: backbone.config.image_size, or `stages`"
        )


def _source_warnings(run: RunConfig, ranks: int | None, access: Access | None) -> Iterator[str]:
    """Yield warnings about the datasets of a run. Datasets that cannot be listed are reported as errors elsewhere.
    Without `access`, remote servers are not contacted."""
    shards_of = {f"data.datasets.{name}": _listed(source, access) for name, source in run.data.datasets.items()}
    held_out = {f"data.validation.{name}": _listed(source, access) for name, source in run.data.validation.items()}
    pairs = [*combinations(shards_of.items(), 2)]
    pairs += [(train, val) for train in shards_of.items() for val in held_out.items()]
    for (one, first), (other, second) in pairs:
        common = first & second
        if common:
            why = "so the loss there is that of training data" if other in held_out else "so they count twice"
            yield (
                f"{len(common)} of the {len(second)} shards of {other} are also shards of {one}, {why}. Fix: give it "
                "other shards"
            )
    yield from _repeated_batches(run, ranks or 1, access)
    yield from _repeated_samples(run, access)


def _repeated_batches(run: RunConfig, ranks: int, access: Access | None) -> Iterator[str]:
    if not run.evaluation.every_steps or not run.data.validation:
        return
    counts = [
        read_sample_count(source.path, "samples", access) if _may_be_read(source, access) else None
        for source in run.data.validation.values()
    ]
    known = [count for count in counts if count]
    samples, of_a_batch = sum(known), run.optim.micro_batch_size * ranks
    most = -(-samples // of_a_batch)
    if len(known) == len(counts) and run.evaluation.batches > most:
        yield (
            f"evaluation.batches is {run.evaluation.batches}, and data.validation has {samples} samples, which fill "
            f"{most} batch{'' if most == 1 else 'es'} of {of_a_batch}: samples are read several times. Fix: "
            f"evaluation.batches={most}"
        )


def _repeated_samples(run: RunConfig, access: Access | None) -> Iterator[str]:
    """Warn about datasets that are repeated more often than in any published training. Datasets without a manifest
    and mixtures with a schedule are not checked."""
    sources = run.data.datasets
    weights = {name: source.weight for name, source in sources.items() if not isinstance(source.weight, list)}
    total = sum(weights.values())
    if len(weights) < len(sources) or not total:
        return
    samples = run.optim.steps * run.optim.batch_size
    for name, source in sources.items():
        if source.epochs is not None or not _may_be_read(source, access):
            continue
        count = read_sample_count(source.path, "samples", access)
        epochs = samples * weights[name] / total / count if count else 0.0
        if epochs > MOST_EPOCHS:
            enough = max(1, int(run.optim.steps * MOST_EPOCHS / epochs))
            yield (
                f"data.datasets.{name} has {count:,} samples, and the run repeats them for {epochs:,.0f} epochs; no "
                f"published recipe needs more than {MOST_EPOCHS:,}. Fix: more images, or optim.steps={enough}"
            )


def _may_be_read(source: DatasetConfig, access: Access | None) -> bool:
    """Return whether the shards and their sidecar files may be read: remote ones only with `access`."""
    return access is not None or not is_remote(source.path)


def _listed(source: DatasetConfig, access: Access | None) -> frozenset[str]:
    """Return the shards of a dataset in comparable form; empty if they cannot be listed."""
    if not _may_be_read(source, access):
        return frozenset()
    try:
        shards = expand_shards(source.path, access=access)
    except (UserError, OSError):
        return frozenset()
    return frozenset(str(shard.resolve()) if isinstance(shard, Path) else str(shard) for shard in shards)
