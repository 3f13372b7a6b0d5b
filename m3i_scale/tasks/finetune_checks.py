"""Checks of a fine-tuning before its images are packed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from m3i_scale.config import RunConfig
from m3i_scale.host.output_dir import lock_directory
from m3i_scale.run.check import resolve_run
from m3i_scale.run.data_checks import DataFacts
from m3i_scale.run.resume import check_resume, find_resume
from m3i_scale.run.setup import ResolvedRun
from m3i_scale.tasks.labelled import Labelled
from m3i_scale.tasks.unpacked import TRAIN


def resolve_finetuning(run: RunConfig, data: Labelled, *, here: bool) -> ResolvedRun:
    """Validate the complete config, even if the shards do not exist yet."""
    if data.source is None:
        return resolve_run(run, 1, here=here)
    facts = DataFacts(run, {TRAIN: data.classes})
    if data.categories is not None and data.categories.format == "lvis":
        facts.image_counts = [category.image_count or 0 for category in data.categories.categories]
    return resolve_run(run, 1, here=here, unpacked=facts)


@contextmanager
def packing(run: RunConfig, data: Labelled) -> Iterator[None]:
    """Lock the output directory while images are packed. Check first that it has no checkpoint of a different run."""
    if data.source is None:
        yield
        return
    with lock_directory(run.output_dir):
        checkpoint, _ = find_resume(run, contents=False)  # training reads every byte
        if checkpoint is not None:
            check_resume(resolve_finetuning(run, data, here=False), checkpoint, 1)
        yield
