"""Worker processes that prepare parts of micro-batches. They start once, and receive their work later.

An accelerator, its collectives and pinned memory do not survive a fork, and forking a large process is slow. So a run
starts its workers before it touches any of these. A worker receives its streams and their positions with a work item:
at the start of an iteration, after a rollback to a checkpoint, and at every evaluation.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from m3i_scale.config import DataConfig
from m3i_scale.data.batch import Batch
from m3i_scale.data.mixing import share_of
from m3i_scale.data.reader import ShardReader
from m3i_scale.data.state import StreamState
from m3i_scale.data.stream import ExhaustedError, PartRecipe, Stream
from m3i_scale.data.workers import (
    POLL_S,
    START_METHOD,
    Activity,
    DeathWatch,
    InThread,
    NotYetError,
    await_item,
    leave_signals_to_parent,
    signals_held,
)
from m3i_scale.errors import DataError, UserError

PREFETCH_PARTS = 2
"""Parts that every worker prefetches."""


@dataclass(frozen=True)
class WorkItem:
    """Request for a worker's next part."""

    iteration: int
    """Iteration of the part; 0: before the first iteration."""
    share: int
    """Index of the worker, and of its share of the streams."""
    states: dict[int, dict[str, Any]] | None = None
    """Initial states of its streams, in the first work item of an iteration."""
    recipe: PartRecipe | None = None
    """Sent together with the first states."""


@dataclass(frozen=True)
class PartialBatch:
    """One worker's part of a micro-batch: samples of its streams, and the states of the streams after them."""

    item: WorkItem
    batch: Batch | None
    """None: there is no further complete batch."""
    states: dict[int, dict[str, Any]]
    quarantine: list[dict[str, Any]]
    error: UserError | None = None
    """Error if there is no batch although the data has not ended. It is passed as a value, because an exception raised
    in a worker would lose its fields."""


class PartMaker(Dataset[PartialBatch]):
    """Dataset in a worker that returns parts; the index of a part is its work item. The end of the data is a part too,
    and is repeated for every further work item.

    `activities` are those of all workers, by index.
    """

    _recipe: PartRecipe
    """From the first work item."""

    def __init__(self, activities: list[Activity]) -> None:
        self._activities = activities
        self._reader: ShardReader | None = None
        self._streams: dict[int, Stream] = {}

    def __getitem__(self, item: WorkItem) -> PartialBatch:
        if item.states is not None:
            self._begin(item, item.states)
        part = self._part(replace(item, states=None, recipe=None))  # the part need not return these
        if part.batch is None:
            self._streams = {}
        return part

    def _begin(self, item: WorkItem, states: dict[int, dict[str, Any]]) -> None:
        if self._reader is not None:
            self._reader.close()
        recipe = self._recipe = item.recipe or self._recipe
        self._reader = ShardReader(recipe.access, self._activities[item.share])
        self._streams = {
            number: Stream(recipe.plans[number], recipe, StreamState.from_json(state), self._reader)
            for number, state in states.items()
        }

    def _part(self, item: WorkItem) -> PartialBatch:
        if not self._streams:
            return PartialBatch(item, None, {}, [])
        quarantine: list[dict[str, Any]] = []
        batch: Batch | None = None
        error: UserError | None = None
        try:
            samples = [
                stream.take(quarantine) for stream in self._streams.values() for _ in range(self._recipe.per_stream)
            ]
            batch = self._recipe.collator(samples)
        except ExhaustedError:
            pass
        except UserError as caught:
            error = caught
        states = {number: stream.state.to_json() for number, stream in self._streams.items()}
        return PartialBatch(item, batch, states, quarantine, error)


class PartWorkers:
    """Workers that prepare parts in `data.num_workers` processes, or in a thread if that is 0; `close` stops them."""

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._activities = [Activity() for _ in range(max(1, data.num_workers))]
        self._next = [WorkItem(0, share) for share in range(len(self._activities))]
        self._recipes: dict[int, PartRecipe] = {}
        """Recipes that are not yet sent, by worker."""
        self._received = 0
        self._in_use = threading.Lock()
        self.watch = DeathWatch()
        maker = PartMaker(self._activities)
        self._parts: InThread[PartialBatch] | Iterator[PartialBatch]
        if not data.num_workers:
            self._parts = InThread(maker[item] for item in self._work_items())
            return
        # Without batching, a DataLoader returns results in the order of the indices, which alternate by worker.
        loader = DataLoader(
            maker,
            sampler=self._work_items(),
            batch_size=None,
            num_workers=data.num_workers,
            multiprocessing_context=START_METHOD,
            prefetch_factor=PREFETCH_PARTS,
            timeout=min(POLL_S, data.timeout_s),
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # otherwise the loader would advance the generator of the training process
        )
        with signals_held(), self.watch.starting():
            self._parts = iter(loader)

    def configure(self, recipe: PartRecipe) -> None:
        """Send every worker its share of the recipe with its next states; call it before the first `iterate`."""
        for share in range(len(self._next)):
            plans = {number: recipe.plans[number] for number in share_of(list(recipe.plans), share, len(self._next))}
            self._recipes[share] = replace(recipe, plans=plans)

    def iterate(self, states: Mapping[int, dict[str, Any]], rank: int) -> Generator[list[PartialBatch]]:
        """Yield one part of every worker, in stream order; after an error, only the parts up to it.

        Parts of earlier iterations are dropped. Blocks while an earlier iteration is not closed. `states` are those of
        all streams; `rank` is named in timeout errors.
        """
        with self._held(rank):
            iteration = self._next[0].iteration + 1
            for share in range(len(self._next)):
                streams = share_of(list(states), share, len(self._next))
                self._next[share] = WorkItem(iteration, share, {number: states[number] for number in streams})
            while True:
                parts: list[PartialBatch] = []
                while len(parts) < len(self._activities) and not (parts and parts[-1].error):
                    part = self._await(rank)
                    if part.item.iteration == iteration:
                        parts.append(part)
                yield sorted(parts, key=lambda part: part.item.share)

    def _work_items(self) -> Iterator[WorkItem]:
        """Yield the work items of all workers, in turn."""
        for share in itertools.cycle(range(len(self._next))):
            item = self._next[share]
            self._next[share] = replace(item, states=None)
            yield item if item.states is None else replace(item, recipe=self._recipes.pop(share, None))

    @contextlib.contextmanager
    def _held(self, rank: int) -> Iterator[None]:
        limit_s = self._data.timeout_s
        if not self._in_use.acquire(timeout=limit_s):
            raise DataError(
                f"the loader is still reading for an earlier iterator after data.timeout_s = {limit_s:g} seconds",
                where=f"rank {rank}, {self._activities[self._received % len(self._activities)].describe()}",
                fix="close an iterator before you start the next one; if the storage is only slow, raise "
                "data.timeout_s",
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _await(self, rank: int) -> PartialBatch:
        number, limit_s = self._received % len(self._activities), self._data.timeout_s
        activity = self._activities[number]
        try:
            part = await_item(self._parts, activity, limit_s)
        except NotYetError:
            reader = f"worker {number}" if self._data.num_workers else "the training process"
            raise DataError(
                f"no sample has arrived for {activity.idle_s:.0f} s, more than data.timeout_s = {limit_s:g}",
                where=f"{reader} of rank {rank}, {activity.describe()}",
                fix="check the storage and rerun the command to resume; if it is only slow, raise data.timeout_s",
            ) from None
        self._received += 1
        return part

    def close(self) -> None:
        """Stop the workers, after waiting for a running iteration."""
        self._in_use.acquire(timeout=POLL_S)
        if isinstance(self._parts, InThread):
            self._parts.close()
        else:
            self.watch.stop(self._parts)
        self._parts = iter(())  # the iterator refers to this object: otherwise only the cyclic collector would free it


@contextlib.contextmanager
def started_workers(data: DataConfig) -> Iterator[list[PartWorkers]]:
    """Start the workers for the training and validation data of this rank; stop them when the context ends.

    They are forks of this process: enter the context before using an accelerator or a process group.
    """
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(contextlib.closing(PartWorkers(data)))
            for sources in (data.datasets, data.validation)
            if sources
        ]


def _start_worker(_: int) -> None:
    # Otherwise the tokenizer warns about the fork, and every worker starts one thread per core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    leave_signals_to_parent()
