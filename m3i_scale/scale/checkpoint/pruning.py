"""Retention on the disk: what is there, what goes. One process, no collectives: any thread may call it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from m3i_scale.scale.checkpoint.commit import point_latest
from m3i_scale.scale.checkpoint.locate import checkpoints, named_latest
from m3i_scale.scale.checkpoint.manifest import step_of, verify
from m3i_scale.scale.checkpoint.reading import alone_with
from m3i_scale.scale.checkpoint.retention import LAST_GOOD, Entry, Rules, which_to_keep
from m3i_scale.scale.checkpoint.space import discard, doomed, write_guard

Metrics = Mapping[int, Mapping[str, float]]
"""Figures of evaluations, by step."""


@dataclass
class Pruned:
    """What retention decided, and what became of it."""

    kept: dict[Path, list[str]]
    """With all reasons."""
    going: list[Entry]
    """Newest first."""
    removed: list[Path] = field(default_factory=list)
    in_use: list[Path] = field(default_factory=list)
    """Were to go, and stay because another process reads them."""

    @property
    def over_limit(self) -> bool:
        """Whether one checkpoint alone is larger than all together may be."""
        return any(LAST_GOOD in reasons for reasons in self.kept.values())


def entries_of(root: Path, metrics: Metrics, *, contents: bool = False) -> list[Entry]:
    """The checkpoints of a folder, the newest first.

    Args:
        root: the folder of checkpoints; need not exist.
        metrics: of the run.
        contents: read every byte to find out what is good; otherwise names and sizes decide.
    """
    found = []
    for path in checkpoints(root):
        step = step_of(path) or 0
        good = not verify(path, contents=contents)
        found.append(Entry(path, step, folder_bytes(path), good, metrics.get(step, {})))
    return found


def plan_prune(root: Path, rules: Rules, metrics: Metrics, *, committed: Path | None = None) -> Pruned:
    """What would stay and go. Before anything may go, the newest one that counts as good is read, byte by byte; one
    that turns out not to be good counts for no rule, and the next is read.

    Args:
        root: the folder of checkpoints.
        rules: what stays.
        metrics: of the run.
        committed: a checkpoint that this process has just committed, and so need not read again.
    """
    entries = entries_of(root, metrics)
    while True:
        kept = which_to_keep(entries, rules)
        going = [entry for entry in entries if entry.path not in kept]
        newest = next((entry for entry in entries if entry.good), None)
        if not going or newest is None or newest.path == committed or not verify(newest.path):
            return Pruned(kept, going)
        entries = [replace(entry, good=False) if entry is newest else entry for entry in entries]


def prune(root: Path, rules: Rules, metrics: Metrics | None = None, *, committed: Path | None = None) -> Pruned:
    """Remove what no rule keeps. Call it in one process, which holds the lock of the output directory.

    Args:
        root: the folder of checkpoints.
        rules: what stays.
        metrics: of the run; none where no rule asks for them.
        committed: a checkpoint that this process has just committed, and so need not read again.

    Raises:
        CheckpointError: the disk refused.
    """
    planned = plan_prune(root, rules, metrics or {}, committed=committed)
    remove_checkpoints(planned)
    return planned


def remove_checkpoints(planned: Pruned) -> None:
    """Carry out a plan, the newest first, so that a kill half-way leaves the older ones for the next time.

    Raises:
        CheckpointError: the disk refused.
    """
    for entry in planned.going:
        path = entry.path
        with write_guard(path.parent, doomed(path)), alone_with(path) as alone:
            if alone:
                discard(path)
        (planned.removed if alone else planned.in_use).append(path)
    if planned.removed:
        _mend_latest(planned.removed)


def _mend_latest(removed: Sequence[Path]) -> None:
    """A newest one that was not good may be what `latest` names, and have gone."""
    root = removed[0].parent
    left = checkpoints(root)
    if left and named_latest(root) in {path.name for path in removed}:
        point_latest(left[0])


def folder_bytes(folder: Path) -> int:
    """Sizes of all files below a folder; links count as themselves, and what a job removes meanwhile as nothing."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterable[int]:
    for here, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                yield Path(here, name).lstat().st_size
