"""Workers make the parts of micro-batches. They are started once, before they know of which data, and told later.

An accelerator, its collectives and what it pins do not outlive a fork well, and a fork of a large process is slow. So a
run starts its workers before it touches any of these. Which streams a worker reads, and from where on, reaches it with
the order for a part: when an iteration begins, when it goes back to a checkpoint, at every evaluation.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from m3i_scale.config import DataConfig
from m3i_scale.data.batch import Batch, Collator
from m3i_scale.data.mixing import Mix, share_of
from m3i_scale.data.reader import ShardReader
from m3i_scale.data.remote.access import Access
from m3i_scale.data.state import StreamState
from m3i_scale.data.stream import ExhaustedError, Stream, StreamSource
from m3i_scale.data.watchdog import POLL_S, Activity, FromWorkers, InThread, NotYetError, await_item, stalled
from m3i_scale.data.workers import START_METHOD, DeathWatch, leave_signals_to_parent, signals_held
from m3i_scale.errors import DataError, UserError

PREFETCH_PARTS = 2
"""Parts that every worker prepares ahead."""


@dataclass(frozen=True)
class PartRecipe:
    """Holds all that a worker needs to make parts, except the state."""

    plans: dict[int, dict[str, StreamSource]]
    mix: Mix
    per_stream: int
    collator: Collator
    data: DataConfig
    access: Access
    seed: int
    quarantine: Path | None


@dataclass(frozen=True)
class WorkItem:
    """Asks a worker for its next part."""

    iteration: int
    """Which iteration the part is for; 0: none yet."""
    share: int
    """Number of the worker, and so of its share of the streams."""
    states: dict[int, dict[str, Any]] | None = None
    """Where its streams begin, with the first order of an iteration."""
    recipe: PartRecipe | None = None
    """With the first states."""


@dataclass(frozen=True)
class PartialBatch:
    """Holds what one worker gives to a micro-batch: samples of its streams, and where the streams stand after them."""

    order: WorkItem
    batch: Batch | None
    """None: there is no further whole one."""
    states: dict[int, dict[str, Any]]
    quarantine: list[dict[str, Any]]
    fault: UserError | None = None
    """Why there is none, where the sources have not ended. As a value: an exception would lose its parts on the way out
    of a worker."""


class PartMaker(Dataset[PartialBatch]):
    """Makes the parts of one worker. The index of a part is the order for it.

    The end comes out as a part too, and again with every further order.

    Args:
        activities: of all workers, by number.
    """

    def __init__(self, activities: list[Activity]) -> None:
        self._activities = activities
        self._recipe: PartRecipe | None = None
        self._reader: ShardReader | None = None
        self._streams: dict[int, Stream] = {}

    def __getitem__(self, order: WorkItem) -> PartialBatch:
        """Return the part; the last one has no batch."""
        if order.states is not None:
            self._begin(order, order.states)
        part = self._part(replace(order, states=None, recipe=None))  # neither need come back with the part
        if part.batch is None:
            self._streams = {}
        return part

    def _begin(self, order: WorkItem, states: dict[int, dict[str, Any]]) -> None:
        if self._reader is not None:
            self._reader.close()
        recipe = self._recipe = order.recipe or self._recipe
        if recipe is None:
            raise ValueError("the first order with states brings the recipe")
        self._reader = ShardReader(recipe.access, self._activities[order.share])
        self._streams = {
            number: Stream(
                recipe.plans[number],
                recipe.mix,
                StreamState.from_json(state),
                self._reader,
                recipe.data,
                seed=recipe.seed,
                quarantine=recipe.quarantine,
            )
            for number, state in states.items()
        }

    def _part(self, order: WorkItem) -> PartialBatch:
        if self._recipe is None or not self._streams:
            return PartialBatch(order, None, {}, [])
        quarantine: list[dict[str, Any]] = []
        batch: Batch | None = None
        fault: UserError | None = None
        try:
            samples = [
                stream.take(quarantine) for stream in self._streams.values() for _ in range(self._recipe.per_stream)
            ]
            batch = self._recipe.collator(samples)
        except ExhaustedError:
            pass
        except UserError as error:
            fault = error
        states = {number: stream.state.to_json() for number, stream in self._streams.items()}
        return PartialBatch(order, batch, states, quarantine, fault)


class _WorkSampler(Sampler[WorkItem]):
    """Gives the orders that a DataLoader hands to its workers in turn, as indices."""

    def __init__(self, shares: int) -> None:
        self._next = [WorkItem(0, share) for share in range(shares)]
        self._recipes: dict[int, PartRecipe] = {}
        """Those that are not handed out yet."""

    def configure(self, recipe: PartRecipe) -> None:
        """Hand every worker its share of the recipe, with the next states."""
        for share in range(len(self._next)):
            plans = {number: recipe.plans[number] for number in share_of(list(recipe.plans), share, len(self._next))}
            self._recipes[share] = replace(recipe, plans=plans)

    def begin(self, states: Mapping[int, dict[str, Any]]) -> int:
        """Order parts from these states on; return the number of the iteration."""
        iteration = self._next[0].iteration + 1
        for share in range(len(self._next)):
            streams = share_of(list(states), share, len(self._next))
            self._next[share] = WorkItem(iteration, share, {number: states[number] for number in streams})
        return iteration

    def __iter__(self) -> Iterator[WorkItem]:
        for share in itertools.cycle(range(len(self._next))):
            order = self._next[share]
            self._next[share] = replace(order, states=None)
            yield order if order.states is None else replace(order, recipe=self._recipes.pop(share, None))


class PartWorkers:
    """Makes parts of micro-batches in `data.workers` processes, or in a thread if there are none; `close` ends them.

    Args:
        data: number of workers, and for how long one is waited for.
    """

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._activities = [Activity() for _ in range(max(1, data.workers))]
        self._orders = _WorkSampler(len(self._activities))
        self._received = 0
        self._in_use = threading.Lock()
        self.watch = DeathWatch()
        maker = PartMaker(self._activities)
        self._parts: InThread[PartialBatch] | FromWorkers[PartialBatch]
        if not data.workers:
            self._parts = InThread(maker[order] for order in self._orders)
            return
        # Without batching, a DataLoader hands out in order what its workers make of their indices, which come in turn.
        loader = DataLoader(
            maker,
            sampler=self._orders,
            batch_size=None,
            num_workers=data.workers,
            multiprocessing_context=START_METHOD,
            prefetch_factor=PREFETCH_PARTS,
            timeout=min(POLL_S, data.stall_timeout_s),
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its own, or it would draw from the generator that training draws from
        )
        with signals_held(), self.watch.starting():
            self._parts = FromWorkers(iter(loader))

    def configure(self, recipe: PartRecipe) -> None:
        """Tell the workers what to read, before the first of `turns`."""
        self._orders.configure(recipe)

    def iterate(self, states: Mapping[int, dict[str, Any]], rank: int) -> Generator[list[PartialBatch]]:
        """Yield one part of every worker, in the order of the streams; those up to a fault where there is one.

        Parts that were ordered before are dropped. Waits for an iteration that is not closed yet.

        Args:
            states: of all streams.
            rank: named where a worker gives nothing.
        """
        with self._held(rank):
            iteration = self._orders.begin(states)
            while True:
                parts: list[PartialBatch] = []
                while len(parts) < len(self._activities) and not (parts and parts[-1].fault):
                    part = self._await(rank)
                    if part.order.iteration == iteration:
                        parts.append(part)
                yield sorted(parts, key=lambda part: part.order.share)

    @contextlib.contextmanager
    def _held(self, rank: int) -> Iterator[None]:
        limit_s = self._data.stall_timeout_s
        if not self._in_use.acquire(timeout=limit_s):
            raise DataError(
                f"the loader still reads for an earlier iteration after data.stall_timeout_s = {limit_s:g} seconds",
                where=f"rank {rank}, {self._activities[self._received % len(self._activities)].describe()}",
                fix="close an iterator before the next one is asked for a batch; if the storage is only slow, raise "
                "data.stall_timeout_s",
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _await(self, rank: int) -> PartialBatch:
        number, limit_s = self._received % len(self._activities), self._data.stall_timeout_s
        activity = self._activities[number]
        try:
            part: PartialBatch = await_item(self._parts, activity, limit_s)
        except NotYetError:
            worker = number if self._data.workers else None
            raise stalled(activity, rank=rank, worker=worker, timeout_s=limit_s) from None
        self._received += 1
        return part

    def close(self) -> None:
        """End the workers, once they are not waited for any more."""
        self._in_use.acquire(timeout=POLL_S)
        self._parts.close()
        for worker in self.watch.workers:
            worker.terminate()
        for worker in self.watch.workers:
            worker.join(POLL_S)


@contextlib.contextmanager
def started_workers(data: DataConfig) -> Iterator[list[PartWorkers]]:
    """Start what will read the training and the validation data of this rank, until the context ends.

    They are forks of this process: enter it before an accelerator or a process group is touched.
    """
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(contextlib.closing(PartWorkers(data)))
            for sources in (data.sources, data.validation)
            if sources
        ]


def _start_worker(_: int) -> None:
    # Otherwise the tokenizer warns of the fork, and every worker starts as many threads as there are cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    leave_signals_to_parent()
