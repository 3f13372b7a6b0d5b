"""Warnings about data that is read too often: shards in two datasets, too many validation batches, too many epochs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from m3i_scale.config import DatasetConfig, RunConfig
from m3i_scale.data.remote.access import Access
from m3i_scale.data.remote.address import is_remote
from m3i_scale.data.shards import expand_shards, read_sample_count
from m3i_scale.errors import UserError

MOST_EPOCHS = 1600
"""Longest published training of a built-in recipe (MAE, SIM), in epochs."""


def source_warnings(run: RunConfig, ranks: int | None, access: Access | None = None) -> Iterator[str]:
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
