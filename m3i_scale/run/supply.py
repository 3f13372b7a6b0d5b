"""Micro-batches for the loop: where sources can come to an end, all ranks end at the same whole batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from itertools import islice

from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import TrainStream
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.run.callbacks.base import SourceFigures
from m3i_scale.scale.collectives import agree, mean_over_ranks, raise_together


class Supply(Iterator[Batch]):
    """The micro-batches of a stream, in turn.

    Args:
        stream: of this rank.
        batches: its iterator.
        accumulation: micro-batches of a step.
    """

    def __init__(self, stream: TrainStream, batches: Iterator[Batch], accumulation: int) -> None:
        self._stream, self._batches, self._accumulation = stream, batches, accumulation
        self._held: deque[Batch] = deque()
        self.waited_s = 0.0
        """Of `ended`, the last time it was called."""

    def __next__(self) -> Batch:
        """The next micro-batch."""
        return self._held.popleft() if self._held else next(self._batches)

    def ended(self) -> bool:
        """Whether some rank lacks the micro-batches of a whole step; every rank calls it before a step.

        Without `epochs` nothing is fetched and nobody is asked. The stream's state is then that before the step.

        Raises:
            UserError: the data of some rank failed.
        """
        self.waited_s = 0.0
        if not self._stream.ends:
            return False
        started = time.perf_counter()
        before = self._stream.state_dict()
        fault: UserError | None = None
        try:
            self._held.extend(islice(self._batches, self._accumulation))
        except UserError as error:
            fault = error  # not before the others know
        self.waited_s = time.perf_counter() - started
        ended, failed = agree(len(self._held) < self._accumulation, fault is not None)
        if failed:
            raise_together(fault)
        if ended:
            self._held.clear()
            self._stream.load_state_dict(before)
        return ended


def check_supply(stream: TrainStream, batch_size: int, steps: int) -> str | None:
    """What to say before the first step about sources that may end before the last one; None where they do not.

    Raises:
        ConfigError: they hold less than one batch.
    """
    most = stream.samples_at_most
    if most is None or most >= batch_size * steps:
        return None
    if most < batch_size:
        raise ConfigError(
            f"the sources end after {most} samples, and a batch has {batch_size}",
            where="data.sources.*.epochs",
            fix="raise epochs or leave it out, or lower optim.batch_size",
        )
    return f"the sources end after step {most // batch_size} of {steps}, or earlier if samples are bad (epochs)"


def ending_words(stream: TrainStream, step: int, steps: int, world_size: int) -> str:
    """What is said of a run whose sources have ended; every rank calls it."""
    left = mean_over_ranks({name: counts["left"] for name, counts in stream.standing().items()})
    over = ", ".join(f"{name} {round(count * world_size)}" for name, count in left.items())
    return f"the sources are exhausted after step {step} of {steps} (epochs); samples that fill no batch: {over}"


class Shares:
    """Realised against asked shares of sources, over all ranks, so far and since the last record."""

    def __init__(self, stream: TrainStream) -> None:
        self._stream = stream
        self._before: dict[str, float] = {}

    def start(self) -> None:
        """Count from here on what comes after the last record."""
        self._before = self._counts()

    def record(self) -> dict[str, SourceFigures]:
        """Figures of every source by name; every rank calls it."""
        now, names = self._counts(), list(self._stream.standing())
        # The difference is taken before the ranks are: they exchange 32 bits, too few for it among billions.
        recent = mean_over_ranks({key: value - self._before[key] for key, value in now.items()})
        self._before = now
        total = mean_over_ranks(now)
        return {
            name: SourceFigures(
                share=_share(total, name, names, "served"),
                asked=_share(total, name, names, "asked"),
                recent_share=_share(recent, name, names, "served"),
                recent_asked=_share(recent, name, names, "asked"),
                epoch=total[f"{name}/read"] / total[f"{name}/pass"],
            )
            for name in names
        }

    def _counts(self) -> dict[str, float]:
        return {
            f"{name}/{key}": value for name, counts in self._stream.standing().items() for key, value in counts.items()
        }


def _share(counts: dict[str, float], name: str, names: list[str], key: str) -> float:
    total = sum(counts[f"{other}/{key}"] for other in names)
    return counts[f"{name}/{key}"] / total if total else 0.0
