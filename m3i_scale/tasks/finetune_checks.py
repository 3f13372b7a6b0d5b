"""Checks of a fine-tuning before its images are packed, and of the result of an earlier start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from m3i_scale.config import RunConfig, read_yaml
from m3i_scale.errors import ConfigError
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


def check_trained(run: RunConfig, data: Labelled) -> None:
    """Validate that the latest valid checkpoint belongs to the run that the result would describe."""
    checkpoint, _ = find_resume(run)
    if checkpoint is None:
        raise ConfigError(
            "nothing is trained there", where=str(run.output_dir), fix="the same command without --evaluate-only"
        )
    steps = read_yaml(checkpoint / "run.yaml")["optim"]["steps"]
    if steps != run.optim.steps:
        raise ConfigError(
            f"the run there has {steps} steps, and by this command it would have {run.optim.steps}",
            where=f"--evaluate-only, {checkpoint}",
            why="the result would describe a training that did not happen",
            fix="the options and fields that it was trained with, such as --epochs",
        )
    check_resume(resolve_finetuning(run, data, here=False), checkpoint, 1)
