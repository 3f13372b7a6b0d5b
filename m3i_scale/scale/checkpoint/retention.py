"""Which checkpoints stay: rules, and what they say about a folder of checkpoints. No disk is touched here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Entry:
    """One checkpoint, as far as retention looks at it."""

    path: Path
    step: int
    size: int
    """Bytes on the disk."""
    good: bool
    """As far as is known; what is not good counts for no rule."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Figures of the evaluation at its step."""


@dataclass(frozen=True)
class Best:
    """Keep those with the best figure."""

    metric: str
    mode: Literal["min", "max"] = "min"
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("count must be at least 1")


@dataclass(frozen=True)
class Rules:
    """A checkpoint stays when any rule wants it, as far as `max_bytes` allows."""

    latest: int = 1
    """The newest so many."""
    every_steps: int | None = None
    """Those of steps that are multiples of this."""
    best: Best | None = None
    max_bytes: int | None = None
    """All that stay together."""

    def __post_init__(self) -> None:
        for name, value in (("latest", self.latest), ("every_steps", self.every_steps), ("max_bytes", self.max_bytes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")


LAST_GOOD = "the last good one, though larger than the limit"


def which_to_keep(entries: Iterable[Entry], rules: Rules) -> dict[Path, list[str]]:
    """The checkpoints that stay, each with every reason for it; the others go.

    The newest good one always stays. Where all together are larger than `max_bytes`, those go first that stand last in
    this order: the newest; the best; other late ones; multiples of `every_steps`, newest first; what is not good.
    One that several rules want counts once. What is not good stays while it is newer than what `latest` keeps: a run
    that fell back replaces it. Without any good one everything stays.

    A second call with what the first one kept keeps all of it, and a larger limit never keeps fewer.
    """
    newest_first = sorted(entries, key=lambda entry: (entry.step, entry.path.name), reverse=True)
    good = [entry for entry in newest_first if entry.good]
    if not good:
        return {entry.path: ["there is no good one"] for entry in newest_first}
    wanted: dict[Path, list[str]] = {}
    sizes = {entry.path: entry.size for entry in newest_first}
    for entry, reason in _by_weight(newest_first, good, rules):
        wanted.setdefault(entry.path, []).append(reason)
    return _within(wanted, sizes, rules.max_bytes)


def ranked(entries: Iterable[Entry], best: Best) -> list[Entry]:
    """Those that have the figure, the best first; of equals the newest first. A figure that is not finite is none."""
    sign = 1 if best.mode == "min" else -1
    known = [entry for entry in entries if math.isfinite(entry.metrics.get(best.metric, math.nan))]
    return sorted(known, key=lambda entry: (sign * entry.metrics[best.metric], -entry.step))


def _by_weight(newest_first: Sequence[Entry], good: Sequence[Entry], rules: Rules) -> Iterator[tuple[Entry, str]]:
    """(checkpoint, reason), what must stay first."""
    yield good[0], f"latest 1 of {rules.latest}"
    if rules.best is not None:
        for rank, entry in enumerate(ranked(good, rules.best)[: rules.best.count], start=1):
            value = entry.metrics[rules.best.metric]
            yield entry, f"best {rank} of {rules.best.count}: {rules.best.metric} {value:.6g}"
    for number, entry in enumerate(good[1 : rules.latest], start=2):
        yield entry, f"latest {number} of {rules.latest}"
    if rules.every_steps is not None:
        for entry in good:
            if entry.step % rules.every_steps == 0:
                yield entry, f"every {rules.every_steps} steps"
    full = len(good) >= rules.latest
    for entry in newest_first:
        if not entry.good and not (full and entry.step < good[rules.latest - 1].step):
            yield entry, "not good, and as new as what is kept"


def _within(wanted: dict[Path, list[str]], sizes: Mapping[Path, int], limit: int | None) -> dict[Path, list[str]]:
    """The beginning of `wanted` that fits; the first one in any case."""
    kept: dict[Path, list[str]] = {}
    total = 0
    for path, reasons in wanted.items():
        total += sizes[path]
        if limit is not None and total > limit:
            return kept or {path: [*reasons, LAST_GOOD]}
        kept[path] = reasons
    return kept
