"""Supply of micro-batches that keeps ranks in step: all get a batch or none, and all end at the same global batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from itertools import islice

from deepspeed.accelerator import get_accelerator

from m3i_scale.data.batch import Batch
from m3i_scale.data.loader import TrainStream
from m3i_scale.data.stream import Account
from m3i_scale.engine.agree import agree, mean_over_ranks, raise_together, summed_counts
from m3i_scale.errors import ConfigError, DataError, UserError


class Fetcher(Iterator[Batch]):
    """Iterator over this rank's micro-batches. If one is missing, it repeats the last one until the ranks next agree.

    A rank without data cannot leave: the forward and backward passes of the other ranks run collectives with it. Asking
    all ranks before every pass would cost a collective and a device synchronization each time. So the rank finishes the
    step with its previous batch, and the vote that ends every step anyway, before the optimizer, carries its error.
    Only the first batch has no predecessor to repeat, so it needs a separate vote.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._last: Batch | None = None
        self._error: UserError | None = None

    @property
    def failed(self) -> bool:
        """Return whether this rank's data failed since the last agreement."""
        return self._error is not None

    def __next__(self) -> Batch:
        """Return the next batch, or repeat the last one. All ranks must request the first one together."""
        if self._error is not None and self._last is not None:
            return self._last
        first, batch = self._last is None, None
        try:
            batch = next(self._batches, None)
        except UserError as error:
            self._error = error
        if first and agree(self.failed)[0]:
            self.raise_together()
        if batch is not None:
            self._last = batch
        elif self._error is None or self._last is None:
            raise StopIteration
        return self._last

    def raise_together(self) -> None:
        """Raise the error of one rank on every rank. Call it on all ranks once one of them has `failed`."""
        raise_together(self._error)


class StepBatches(Iterator[Batch]):
    """Iterator over the micro-batches of a stream that detects the end of the data before a step."""

    def __init__(self, stream: TrainStream, batches: Iterator[Batch], accumulation: int) -> None:
        self._stream, self._batches, self._accumulation = stream, batches, accumulation
        self._held: deque[Batch] = deque()
        self.waited_s = 0.0
        """Seconds that the last call of `ended` waited for data."""

    def __next__(self) -> Batch:
        return self._held.popleft() if self._held else next(self._batches)

    def ended(self) -> bool:
        """Return whether any rank lacks the micro-batches of a complete step. Every rank must call it before a step.

        Without `epochs`, it neither reads data nor communicates. The stream then keeps its state from before the step.
        """
        self.waited_s = 0.0
        if not self._stream.can_end:
            return False
        started = time.perf_counter()
        before = self._stream.state_dict()
        failure: UserError | None = None
        try:
            self._held.extend(islice(self._batches, self._accumulation))
        except UserError as error:
            failure = error  # raise it only once the other ranks know
        self.waited_s = time.perf_counter() - started
        ended, failed = agree(len(self._held) < self._accumulation, failure is not None)
        if failed:
            raise_together(failure)
        if ended:
            # Check now, with the samples read for the step that is not taken: no later check would count them.
            begun = any(stream["taken"] for stream in before["streams"].values())
            reasons = summed_counts(self._stream.quarantined)
            stop_if_bad(self._stream, account_of_all(self._stream), reasons, begun=begun)
            self._held.clear()
            self._stream.load_state_dict(before)
        return ended


class DeviceCopies:
    """Asynchronous copier of pinned batches (`pinning`) to the accelerator, which does not block the CPU."""

    def __init__(self) -> None:
        accelerator = get_accelerator()
        self._stream = None if accelerator.Stream is None else accelerator.Stream()

    def __call__(self, batch: Batch) -> Batch:
        accelerator = get_accelerator()
        with accelerator.stream(self._stream):
            copy = batch.to(accelerator.current_device_name())
        if self._stream is not None:
            current = accelerator.current_stream()
            current.wait_stream(self._stream)
            for tensor in copy.tensors.values():  # otherwise a later batch could overwrite their memory too early
                tensor.record_stream(current)
        return copy


def account_of_all(stream: TrainStream) -> Account:
    """Return the counts of corrupt samples and shards over all ranks. Every rank must call it."""
    sums = summed_counts(stream.account._asdict())
    return Account(*(sums.get(name, 0) for name in Account._fields))


def stop_if_bad(
    stream: TrainStream, account: Account, reasons: dict[str, int] | None = None, *, begun: bool = True
) -> None:
    """End the run if too much data is corrupt. All ranks have the same counts, so all of them end or none. `account`
    and `reasons` are counts over all ranks; without `reasons`, they are gathered if needed. `begun` is False if the
    datasets ended before the first step."""
    try:
        stream.stop_if_bad(
            account, lambda: summed_counts(stream.quarantined) if reasons is None else reasons, begun=begun
        )
    except DataError as error:
        raise error.raised_everywhere() from None


def check_sources_last(stream: TrainStream, batch_size: int, steps: int) -> str | None:
    """Return a note if the datasets may end before the last step, or None. Call it before the first step."""
    most = stream.samples_at_most
    if most is None or most >= batch_size * steps:
        return None
    if most < batch_size:
        raise ConfigError(
            f"the datasets end after {most} samples, fewer than optim.batch_size ({batch_size})",
            where="data.datasets.*.epochs",
            fix="raise epochs or leave it out, or lower optim.batch_size",
        )
    return f"the datasets end after step {most // batch_size} of {steps}, or earlier if samples are bad (epochs)"


class Shares:
    """Realized and target shares of the datasets over all ranks, since the start and since the last record."""

    def __init__(self, stream: TrainStream) -> None:
        self._stream = stream
        self._before: dict[str, float] = {}
        """Means over the ranks at the last record."""

    def start(self) -> None:
        """Start counting from the current position. Every rank must call it."""
        self._before = self._mean_counts()

    def record(self) -> dict[str, dict[str, float]]:
        """Return the sampling statistics of every dataset by name. Every rank must call it.

        `share`: fraction of all valid samples of the present datasets so far, 0 to 1. `asked`: target value of `share`,
        given weights, schedules and exhausted datasets. `recent_share`, `recent_asked`: since the last record. `epoch`:
        number of epochs over the dataset so far.
        """
        total, names = self._mean_counts(), list(self._stream.source_counts())
        recent = {key: value - self._before[key] for key, value in total.items()}
        self._before = total
        return {
            name: {
                "share": _share(total, name, names, "served"),
                "asked": _share(total, name, names, "asked"),
                "recent_share": _share(recent, name, names, "served"),
                "recent_asked": _share(recent, name, names, "asked"),
                "epoch": total[f"{name}/read"] / total[f"{name}/pass"],
            }
            for name in names
        }

    def _mean_counts(self) -> dict[str, float]:
        return mean_over_ranks(
            {
                f"{name}/{key}": value
                for name, counts in self._stream.source_counts().items()
                for key, value in counts.items()
            }
        )


def _share(counts: dict[str, float], name: str, names: list[str], key: str) -> float:
    total = sum(counts[f"{other}/{key}"] for other in names)
    return counts[f"{name}/{key}"] / total if total else 0.0
