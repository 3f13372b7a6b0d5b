"""Training batches for one rank: the same global batches for any number of ranks and workers, and an O(1) resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from m3i_scale.config import DataConfig, SourceConfig
from m3i_scale.data.batch import Batch
from m3i_scale.data.collate import Collator
from m3i_scale.data.index import ShardIndex, load_index
from m3i_scale.data.order import StreamOrder, deal, seed_of
from m3i_scale.data.reader import ShardReader
from m3i_scale.data.shards import expand_shards, read_label_sets
from m3i_scale.data.stream import FRACTION_COUNTS_AFTER, Stream, StreamSource, StreamState, too_many_bad
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.data.views import ViewMaker
from m3i_scale.data.workers import START_METHOD, leave_signals_to_parent, signals_held
from m3i_scale.errors import ConfigError, DataError, UserError

__all__ = ["TrainStream", "check_shares", "find_tokenizer", "merge_states", "read_label_sets"]

STATE_FORMAT = 1
PREFETCH_PARTS = 2
"""Parts that every worker prepares ahead."""


@dataclass(frozen=True)
class Part:
    """What one worker gives to one micro-batch: the samples of its streams, and where the streams stand after them."""

    batch: Batch
    states: dict[int, dict[str, Any]]
    quarantine: list[dict[str, Any]]


class TrainStream:
    """Endless micro-batches of one rank.

    Rank r owns streams [r·S/W, (r+1)·S/W) of S; the concatenation of the micro-batches of all ranks is the same for
    every number of ranks W and workers.

    Args:
        data: streams, workers, limits, augmentation.
        sources: what to read (data.sources, or data.validation).
        views: V, number of views per sample.
        image_size: side of a view in pixels.
        micro_batch_size: samples per batch of this rank.
        world_size: number of ranks.
        rank: this rank.
        seed: seed of the run.
        tokenizer: None leaves captions out.
        max_tokens: captions are cut to this many tokens.
        label_sets: as from `read_label_sets`; the order numbers them.
        cache_dir: for indices of shards that have none; shared by the ranks.
        augment: False gives centre crops, for evaluation.
        quarantine_path: JSON lines of bad samples; None writes none.

    Raises:
        ConfigError: ranks, streams, workers and batch do not fit.
        DataError: shards that are missing, damaged, hostile or too few.
    """

    def __init__(
        self,
        data: DataConfig,
        sources: dict[str, SourceConfig],
        *,
        views: int,
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
    ) -> None:
        check_shares(data, micro_batch_size=micro_batch_size, world_size=world_size)
        if not sources:
            raise ConfigError("there is no source", where="data.sources", fix="name at least one source of shards")
        self._data = data
        self._quarantine_path = quarantine_path
        own = data.streams // world_size
        self._streams = range(rank * own, (rank + 1) * own)
        self._order: dict[str, Any] = {"seed": seed, "streams": data.streams, "shuffle_shards": data.shuffle_shards}
        self._fingerprints: dict[str, dict[str, Any]] = {}
        plans = self._plan(sources, label_sets, cache_dir, rank, seed)
        self._states = {stream: _start(sources) for stream in self._streams}
        self._recipe = PartRecipe(
            plans=plans,
            per_stream=micro_batch_size // own,
            views=ViewMaker(data.augment, views=views, image_size=image_size, augment=augment),
            collator=Collator(tokenizer, max_tokens),
            seed=seed,
            max_pixels=data.max_image_pixels,
            max_bad_fraction=data.max_bad_fraction,
        )

    def __iter__(self) -> Generator[Batch]:
        """Batches from the present position on; `close()` ends the workers.

        What workers prepared for an earlier iterator is dropped.

        Raises:
            DataError: too many bad samples, or a shard that cannot be read any more.
        """
        parts = self._parts()
        count = max(1, self._data.workers)
        while True:
            taken = [_unwrap(next(parts)) for _ in range(count)]
            for part in taken:
                self._states.update({stream: StreamState(**state) for stream, state in part.states.items()})
                self._write_quarantine(part.quarantine)
            self._stop_if_bad()
            yield Batch.cat([part.batch for part in taken])

    @property
    def quarantined(self) -> dict[str, int]:
        """Bad samples of this rank's streams so far, by reason."""
        counts: Counter[str] = Counter()
        for state in self._states.values():
            counts.update(state.bad)
        return dict(counts)

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch that was handed out last, as JSON types; see `merge_states` for all ranks."""
        return {
            "format": STATE_FORMAT,
            "order": self._order,
            "sources": self._fingerprints,
            "streams": {str(stream): state.to_json() for stream, state in self._states.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position: this rank's streams are picked out, so any number of ranks may have saved it.

        Raises:
            DataError: saved with another order (seed, streams, sources), other shards, or without these streams.
        """
        if state.get("format") != STATE_FORMAT:
            raise DataError(f"unknown format of the data state: {state.get('format')}")
        _refuse_changes("order", state["order"], self._order)
        _refuse_changes("sources", state["sources"], self._fingerprints)
        missing = [stream for stream in self._streams if str(stream) not in state["streams"]]
        if missing:
            raise DataError(
                f"the data state lacks streams {missing}",
                why="every rank saves the streams it owns",
                fix="merge the states of all ranks (merge_states)",
            )
        self._states = {stream: StreamState(**state["streams"][str(stream)]) for stream in self._streams}

    def _plan(
        self,
        sources: dict[str, SourceConfig],
        label_sets: dict[str, list[str]],
        cache_dir: Path,
        rank: int,
        seed: int,
    ) -> dict[int, dict[str, StreamSource]]:
        plans: dict[int, dict[str, StreamSource]] = {stream: {} for stream in self._streams}
        weights = sum(source.weight for source in sources.values())
        set_numbers = {name: number for number, name in enumerate(label_sets)}
        for name, source in sources.items():
            where = f"source '{name}'"
            indices = load_index(expand_shards(source.shards, where), cache_dir, rank=rank)
            dealt = deal([len(index) for index in indices], self._data.streams, where)
            self._fingerprints[name] = {**_fingerprint(indices), "weight": source.weight}
            label_set = source.label_set or name
            for stream in self._streams:
                shards = dealt[stream]
                order_seed = seed_of("order", seed, name, stream)
                sizes = [len(indices[shard]) for shard in shards]
                plans[stream][name] = StreamSource(
                    name=name,
                    order=StreamOrder(shards, sizes, self._data.shuffle_shards, order_seed),
                    indices={shard: indices[shard] for shard in shards},
                    label_set=set_numbers.get(label_set, -1),
                    classes=len(label_sets[label_set]) if label_set in label_sets else None,
                    share=source.weight / weights,
                    caption_lines=source.captions == "lines",
                )
        return plans

    def _parts(self) -> Iterator[Part | UserError]:
        dataset = PartDataset(self._recipe, {stream: state.to_json() for stream, state in self._states.items()})
        if not self._data.workers:
            return iter(dataset)
        # With one endless part stream a worker and no batching, DataLoader hands out workers' parts in turn, in order.
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._data.workers,
            multiprocessing_context=START_METHOD,
            prefetch_factor=PREFETCH_PARTS,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its own, or it would draw from the generator that training draws from
        )
        with signals_held():
            return iter(loader)

    def _write_quarantine(self, entries: Iterable[dict[str, Any]]) -> None:
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        if not lines or self._quarantine_path is None:
            return
        try:
            self._quarantine_path.parent.mkdir(parents=True, exist_ok=True)
            with self._quarantine_path.open("a", encoding="utf-8") as stream:
                stream.writelines(lines)
        except OSError as error:
            raise DataError(f"cannot write the quarantine file: {error}", where=str(self._quarantine_path)) from None

    def _stop_if_bad(self) -> None:
        read = sum(state.read for state in self._states.values())
        bad = self.quarantined
        if read >= FRACTION_COUNTS_AFTER and sum(bad.values()) > self._data.max_bad_fraction * read:
            where = None if self._quarantine_path is None else str(self._quarantine_path)
            raise too_many_bad(bad, read, self._data.max_bad_fraction, where)


@dataclass(frozen=True)
class PartRecipe:
    """All that a worker needs to make parts, but for the state."""

    plans: dict[int, dict[str, StreamSource]]
    per_stream: int
    views: ViewMaker
    collator: Collator
    seed: int
    max_pixels: int
    max_bad_fraction: float


class PartDataset(IterableDataset[Part | UserError]):
    """Endless parts of micro-batches; each worker makes those of its share of the rank's streams.

    Mistakes of the user come out as values: an exception would lose its parts on the way out of a worker.
    """

    def __init__(self, recipe: PartRecipe, states: dict[int, dict[str, Any]]) -> None:
        self._recipe = recipe
        self._states = states

    def __iter__(self) -> Iterator[Part | UserError]:
        """Parts; ends only after an error."""
        recipe = self._recipe
        reader = ShardReader()
        streams = {
            number: Stream(
                recipe.plans[number],
                StreamState(**self._states[number]),
                reader,
                recipe.views,
                seed=recipe.seed,
                max_pixels=recipe.max_pixels,
                max_bad_fraction=recipe.max_bad_fraction,
            )
            for number in _share_of_worker(list(recipe.plans))
        }
        try:
            while True:
                yield self._part(streams)
        except UserError as error:
            yield error
        finally:
            reader.close()

    def _part(self, streams: dict[int, Stream]) -> Part:
        quarantine: list[dict[str, Any]] = []
        samples = [stream.take(quarantine) for stream in streams.values() for _ in range(self._recipe.per_stream)]
        states = {number: stream.state.to_json() for number, stream in streams.items()}
        return Part(self._recipe.collator(samples), states, quarantine)


def check_shares(data: DataConfig, *, micro_batch_size: int, world_size: int) -> None:
    """Check that ranks, streams, workers and micro-batch fit, before anything is read.

    Raises:
        ConfigError: they do not; the message names values that do.
    """
    if data.streams % world_size:
        raise ConfigError(
            f"{data.streams} streams cannot be shared out evenly over {world_size} ranks",
            where="data.streams",
            why="the order of samples is the same for every number of ranks only if each owns whole streams",
            fix=f"take a multiple of {world_size}, e.g. {_next_multiple(data.streams, world_size)}; "
            f"with {data.streams} streams, {_divisors(data.streams)} ranks fit",
        )
    own = data.streams // world_size
    if micro_batch_size % own:
        raise ConfigError(
            f"a micro-batch of {micro_batch_size} cannot be taken evenly from {own} streams per rank",
            where="optim.micro_batch_size",
            fix=f"take a multiple of {own}, e.g. {_next_multiple(micro_batch_size, own)}, or change data.streams",
        )
    if data.workers and own % data.workers:
        raise ConfigError(
            f"{own} streams per rank cannot be shared out evenly over {data.workers} workers",
            where="data.workers",
            fix=f"take one of {_divisors(own)}, or 0 to load in the training process",
        )


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one, which any number of ranks can load.

    Raises:
        DataError: states of different runs.
    """
    merged = dict(states[0], streams={})
    for state in states:
        _refuse_changes("order", state["order"], merged["order"])
        _refuse_changes("sources", state["sources"], merged["sources"])
        merged["streams"].update(state["streams"])
    return merged


def _start(sources: dict[str, SourceConfig]) -> StreamState:
    return StreamState(positions=dict.fromkeys(sources, 0), served=dict.fromkeys(sources, 0))


def _share_of_worker(streams: list[int]) -> list[int]:
    worker = get_worker_info()
    if worker is None:
        return streams
    share = len(streams) // worker.num_workers
    return streams[worker.id * share : (worker.id + 1) * share]


def _start_worker(_: int) -> None:
    # Otherwise the tokenizer warns of the fork, and every worker starts as many threads as there are cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    leave_signals_to_parent()


def _unwrap(part: Part | UserError) -> Part:
    if isinstance(part, UserError):
        raise part
    return part


def _fingerprint(indices: Sequence[ShardIndex]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for index in indices:
        digest.update(f"{index.path.name} {index.size} {len(index)}\n".encode())
    return {"shards": len(indices), "samples": sum(map(len, indices)), "sha256": digest.hexdigest()}


def _refuse_changes(what: str, saved: dict[str, Any], present: dict[str, Any]) -> None:
    for key in sorted({*saved, *present}):
        if saved.get(key) != present.get(key):
            raise DataError(
                f"the data changed since the checkpoint: {key} was {saved.get(key)}, is {present.get(key)}",
                where=f"data state, {what}",
                why="samples would be skipped or repeated without a word",
                fix="restore the shards and settings of the run, or start a new run from its weights",
            )


def _divisors(number: int) -> str:
    return ", ".join(str(value) for value in range(1, number + 1) if number % value == 0)


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of
