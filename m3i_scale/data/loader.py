"""Data loader of a rank: global batches do not depend on the number of ranks and workers, and resume is O(1)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m3i_scale.config import DataConfig, DatasetConfig
from m3i_scale.config.data import Reads
from m3i_scale.config.views import ViewSpecs
from m3i_scale.data.batch import Batch, Collator
from m3i_scale.data.categories import repeats_of
from m3i_scale.data.fingerprint import Shard, fingerprint, listing
from m3i_scale.data.index import load_index
from m3i_scale.data.mixing import UNIT, Mix, check_shares, check_weights, share_of
from m3i_scale.data.order import StreamOrder, ends_of, position_of_pass, seed_of, shard_order
from m3i_scale.data.parts import PartialBatch, PartWorkers
from m3i_scale.data.remote.access import check_access
from m3i_scale.data.shards import expand_shards
from m3i_scale.data.state import (
    STATE_FORMAT,
    Quarantine,
    SourceState,
    StreamState,
    accept_changes,
    carry_over,
    check_format,
    check_order,
)
from m3i_scale.data.stream import (
    FRACTION_COUNTS_AFTER,
    Account,
    PartRecipe,
    StreamSource,
    lost_of_pass,
    too_many_bad,
    too_many_lost,
    without_lost_shards,
)
from m3i_scale.data.views import ViewMaker
from m3i_scale.data.workers import POLL_S, InThread, NotYetError
from m3i_scale.errors import DataError, error_prefix

READY_BATCHES = 1
"""Number of micro-batches that are collated ahead."""


class TrainStream:
    """Iterable over the micro-batches of one rank; infinite unless every dataset has `epochs`.

    Rank r owns streams [r·S/W, (r+1)·S/W) of S. Concatenated over ranks, the micro-batches are the same for every
    number of ranks W and workers.

    Args:
        data: streams, workers, limits, augmentation.
        sources: datasets to read (data.datasets or data.validation).
        views: number of views per sample, or the spec of each view.
        image_size: view size of the backbone in pixels.
        micro_batch_size: samples per batch of this rank.
        seed: seed of the run.
        tokenizer: None drops captions.
        max_tokens: captions are truncated to this length.
        label_sets: from `read_label_sets`; their order defines the indices.
        cache_dir: cache for indices of shards without one; shared by the ranks.
        augment: False uses center crops, for evaluation.
        quarantine_path: JSON lines file of corrupt samples; None writes none.
        reads: annotation that every sample must have, in the class list. `labels` reads `.cls` files, which are
            optional; the other values do not read them.
        workers: running workers to use; None starts new ones for each iterator.
        pin: applied to every tensor of a batch, for example pinning its memory.

    Raises:
        ConfigError: ranks, streams, workers, weights and batch size are incompatible.
        DataError: shards are missing, corrupt, malicious or too few.
    """

    def __init__(
        self,
        data: DataConfig,
        sources: dict[str, DatasetConfig],
        *,
        views: ViewSpecs,
        image_size: int,
        micro_batch_size: int,
        world_size: int,
        rank: int,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None,
        max_tokens: int,
        label_sets: dict[str, list[str]],
        cache_dir: Path,
        augment: bool = True,
        quarantine_path: Path | None = None,
        reads: Reads = "labels",
        workers: PartWorkers | None = None,
        pin: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_shares(data, micro_batch_size=micro_batch_size, world_size=world_size)
        check_weights(sources)
        self._data = data
        self._rank = rank
        self._workers, self._pin = workers, pin
        self._access = check_access(data, sources)
        self._world_size = world_size
        self._streams = share_of(range(data.streams), rank, world_size)
        self._order: dict[str, Any] = {"seed": seed, "streams": data.streams, "shuffle_shards": data.shuffle_shards}
        self._fingerprints: dict[str, dict[str, Any]] = {}
        self._shards: dict[str, list[Shard]] = {}
        self._changes: list[dict[str, Any]] = []
        self.can_end = any(source.epochs is not None for source in sources.values())
        """Whether the data can end; the same on all ranks."""
        self.samples_at_most: int | None = None
        """Upper limit of samples over all ranks, if none is corrupt; None: infinite."""

        view_maker = partial(ViewMaker, views=views, image_size=image_size, augment=augment, reads=reads)

        def make_views(source: DatasetConfig) -> ViewMaker:
            return view_maker(source.augment or data.augment, mean=data.augment.mean, stretch=data.augment.stretch)

        plans = self._plan(sources, label_sets, cache_dir, seed, make_views, reads=reads, views=views)
        self._quarantine = Quarantine(quarantine_path)
        # Computed once because with `epochs` a state is taken at every step.
        self._listings = {name: listing(shards) for name, shards in self._shards.items()} if rank == 0 else {}
        self._states = {stream: StreamState(0, {name: SourceState() for name in sources}) for stream in self._streams}
        self._reached: dict[int, StreamState] = {}
        self._recipe = PartRecipe(
            plans=plans,
            mix=Mix({name: source.weight for name, source in sources.items()}, data.streams),
            per_stream=micro_batch_size // len(self._streams),
            collator=Collator(tokenizer, max_tokens),
            data=data,
            access=self._access,
            seed=seed,
            quarantine=quarantine_path,
        )
        if workers is not None:
            workers.configure(self._recipe)

    def resize(self, image_size: int, micro_batch_size: int) -> None:
        """Set another view size in pixels and micro-batch size of this rank for the next iterator, which continues with
        the next sample."""
        plans = {
            stream: {
                name: replace(source, views=source.views.resized(image_size=image_size))
                for name, source in plan.items()
            }
            for stream, plan in self._recipe.plans.items()
        }
        self._recipe = replace(self._recipe, plans=plans, per_stream=micro_batch_size // len(self._streams))
        if self._workers is not None:
            self._workers.configure(self._recipe)

    def __iter__(self) -> Generator[Batch]:
        """Yield batches from the current position on; `close()` stops workers that this stream started.

        Batches that workers prefetched for an earlier iterator are dropped. Iteration ends before the first incomplete
        batch; other ranks may yield one more.
        """
        self._reached = {}
        states = {stream: state.to_json() for stream, state in self._states.items()}
        with contextlib.ExitStack() as stack:
            workers = self._workers
            if workers is None:
                workers = stack.enter_context(contextlib.closing(PartWorkers(self._data)))
                workers.configure(self._recipe)
            ready = InThread(self._joined(workers.iterate(states, self._rank)), ahead=READY_BATCHES)
            stack.callback(ready.close)
            while True:
                with workers.watch.waiting():
                    parts, batch = _await(ready)
                for part in parts:
                    self._quarantine.add(part.quarantine)
                    if part.error is not None:
                        raise part.error
                after = {
                    stream: StreamState.from_json(state) for part in parts for stream, state in part.states.items()
                }
                if batch is None:
                    self._reached = after
                    return
                self._states.update(after)
                # All ranks yield the same number of valid samples, so this rank's corrupt ones alone may be too many.
                account = self.account
                self.stop_if_bad(account._replace(read=account.bad + (account.read - account.bad) * self._world_size))
                yield batch

    def _joined(self, turns: Generator[list[PartialBatch]]) -> Generator[tuple[list[PartialBatch], Batch | None]]:
        """Yield each micro-batch with its parts, in a background thread; the last batch is None."""
        with contextlib.closing(turns):
            for parts in turns:
                batches = [part.batch for part in parts if part.batch is not None]
                if len(batches) < len(parts):
                    yield parts, None
                    return
                batch = Batch.cat(batches)
                yield parts, batch if self._pin is None else batch.changed(self._pin)

    def peek(self, count: int = 1) -> Batch:
        """Return the next batches as one, without advancing and without recording corrupt samples.

        Raises:
            DataError: the batches cannot be read, or the datasets end before them.
        """
        before, quarantine = self.state_dict(), self._quarantine
        self._quarantine = Quarantine(None)
        try:
            with contextlib.closing(iter(self)) as batches:
                peeked = list(islice(batches, count))
        finally:
            self._quarantine = quarantine
            self.load_state_dict(before)
        if len(peeked) < count:
            which = "the first batch" if count == 1 else f"the first {count} batches"
            raise DataError(f"the datasets end before {which}", fix="raise epochs or leave it out")
        return Batch.cat(peeked)

    @property
    def sample_counts(self) -> dict[str, int]:
        """Return the number of samples of every dataset."""
        return {name: sum(shard[2] for shard in shards) for name, shards in self._shards.items()}

    @property
    def quarantined(self) -> dict[str, int]:
        """Return the number of corrupt samples of this rank's streams by reason, once per epoch each. After the data
        has ended, samples of the last, incomplete batch are included."""
        counts: Counter[str] = Counter()
        for state in self._counted.values():
            counts.update(state.bad)
        return dict(counts)

    @property
    def account(self) -> Account:
        """Return this rank's counts of corrupt samples, as in `quarantined`; sum them over ranks for `stop_if_bad`."""
        bad, read = without_lost_shards(self.quarantined, sum(state.read for state in self._counted.values()))
        return Account(lost_of_pass(self._counted, self._recipe.plans), sum(bad.values()), read)

    @property
    def _counted(self) -> dict[int, StreamState]:
        return self._states | self._reached

    def stop_if_bad(
        self, account: Account, reasons: Callable[[], Mapping[str, int]] | None = None, *, begun: bool = True
    ) -> None:
        """Stop the run if too many samples are corrupt over all ranks: one shard may be most of one rank's data.

        Args:
            account: sums over all ranks.
            reasons: called on failure for the counts by reason over all ranks; None uses the counts of this rank.
            begun: False if the data ended before the first step.

        Raises:
            DataError: more than data.max_corrupt_fraction is corrupt or lost, or the run could not start.
        """
        limit, where = self._data.max_corrupt_fraction, self._quarantine.path
        place = None if where is None else str(where)
        too_bad = account.read >= FRACTION_COUNTS_AFTER and account.bad > limit * account.read
        if begun and not too_bad and account.lost <= limit * self._pass_samples:
            return
        counts = self.quarantined if reasons is None else reasons()
        if not begun:
            what = "a stream ends before the first step"
            read = account.read + sum(counts.values()) - account.bad
            raise too_many_bad(counts, read, limit, place, what)
        if too_bad:
            raise too_many_bad(without_lost_shards(counts, 0)[0], account.read, limit, place)
        raise too_many_lost(account.lost, self._pass_samples, limit, counts, place)

    def source_counts(self) -> dict[str, dict[str, float]]:
        """Return the counts of every dataset, summed over this rank's streams.

        `served`: valid samples yielded. `asked`: target count by weight. `read`: samples read, corrupt ones included.
        `pass`: samples per epoch. `left`: samples that remain; 0 if the dataset never ends.
        """
        counts = {name: dict.fromkeys(("served", "asked", "read", "pass", "left"), 0.0) for name in self._fingerprints}
        for number, plan in self._recipe.plans.items():
            for name, source in plan.items():
                state, of_source = self._states[number].sources[name], counts[name]
                of_source["served"] += state.served
                of_source["asked"] += state.served + state.credit / UNIT
                of_source["read"] += state.position
                of_source["pass"] += source.order.share
                of_source["left"] += 0 if source.end is None else source.end - state.position
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last yielded batch, as JSON types; see `merge_states` for all ranks.

        Its size does not depend on the position. The state of rank 0 also lists the shards, a few characters each.
        """
        return {
            "format": STATE_FORMAT,
            "order": self._order,
            "sources": self._fingerprints,
            "changes": self._changes,
            "listings": self._listings,
            "streams": {str(stream): state.to_json() for stream, state in self._states.items()},
        }

    def load_state_dict(self, state: dict[str, Any], changed_datasets: Collection[str] = ()) -> dict[str, str]:
        """Resume this rank's streams from a saved position; any number of ranks may have saved the state.

        Args:
            state: from `state_dict` or `merge_states`.
            changed_datasets: names of all datasets that may differ from the state.

        Returns:
            The differences, by dataset name.

        Raises:
            DataError: the state has another order (seed, streams) or lacks these streams, or datasets differ that
                `changed_datasets` does not name.
        """
        check_format(state)
        check_order(state["order"], self._order)
        changed = accept_changes(state, self._fingerprints, self._shards, changed_datasets)
        missing = [stream for stream in self._streams if str(stream) not in state["streams"]]
        if missing:
            raise DataError(
                f"the data state has no streams {missing}",
                why="every rank saves only its own streams",
                fix="merge the states of all ranks (merge_states)",
            )
        before = {stream: StreamState.from_json(state["streams"][str(stream)]) for stream in self._streams}
        self._states = {
            stream: carry_over(old, changed, state["sources"], self._fingerprints) for stream, old in before.items()
        }
        self._reached = {}
        self._changes = list(state["changes"])
        if changed:
            samples = before[self._streams[0]].taken * self._data.streams
            self._changes.append({"samples": samples, "sources": sorted(changed)})
        return changed

    def _plan(
        self,
        sources: dict[str, DatasetConfig],
        label_sets: dict[str, list[str]],
        cache_dir: Path,
        seed: int,
        make_views: Callable[[DatasetConfig], ViewMaker],
        *,
        reads: Reads,
        views: ViewSpecs,
    ) -> dict[int, dict[str, StreamSource]]:
        plans: dict[int, dict[str, StreamSource]] = {stream: {} for stream in self._streams}
        ends: list[list[int | None]] = [[] for _ in range(self._data.streams)]
        self._pass_samples = 0
        set_numbers = {name: number for number, name in enumerate(label_sets)}
        for name, source in sources.items():
            where = f"dataset '{name}'"
            places = expand_shards(source.path, where, self._access.at_start())
            with error_prefix(where):
                indices = load_index(places, cache_dir, rank=self._rank, access=self._access)
            self._shards[name] = [(index.path.name, index.size, len(index), index.digest) for index in indices]
            indices = [indices[shard] for shard in shard_order(len(indices), seed, name)]
            repeat_seed, limits = seed_of("repeats", seed, name), self._access.at_start()
            repeats = repeats_of(indices, source.repeat_threshold, repeat_seed, where, limits)
            digest = None if repeats is None else repeats.digest
            self._fingerprints[name] = fingerprint(self._shards[name], source, self._data.augment, digest, views)
            sizes = [len(index) for index in indices] if repeats is None else np.diff(repeats.ends(0), prepend=0)
            shard_ends = ends_of(sizes, self._data.streams, where)
            samples = int(shard_ends[-1])
            self._pass_samples += samples
            for stream, of_stream in enumerate(ends):
                passes = source.epochs
                end = None if passes is None else position_of_pass(passes, samples, stream, self._data.streams)
                of_stream.append(end)
            label_set = (source.label_set or name) if source.labels else ""
            classes = len(label_sets[label_set]) if label_set in label_sets else None
            for stream in self._streams:
                order_seed = seed_of("order", seed, name, stream)
                order = StreamOrder(
                    shard_ends, stream, self._data.streams, self._data.shuffle_shards, order_seed, repeats
                )
                plans[stream][name] = StreamSource(
                    name=name,
                    order=order,
                    indices={shard: indices[shard] for shard in order.shards},
                    label_set=set_numbers.get(label_set, -1),
                    classes=classes,
                    reads=reads,
                    views=make_views(source),
                    captions=source.captions,
                    end=ends[stream][-1],
                )
        if all(end is not None for of_stream in ends for end in of_stream):
            self.samples_at_most = len(ends) * min(sum(end or 0 for end in of_stream) for of_stream in ends)
        return plans


def _await(ready: InThread[tuple[list[PartialBatch], Batch | None]]) -> tuple[list[PartialBatch], Batch | None]:
    while True:
        with contextlib.suppress(NotYetError):  # the thread enforces the time limit
            return ready.next(POLL_S)
