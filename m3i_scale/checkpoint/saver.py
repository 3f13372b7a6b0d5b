"""Asynchronous checkpoints: copy to a host staging buffer, and write the copy in a thread.

`save` opens the folder and, for background saves, copies this rank's state into a host staging buffer that is reused by
the next save; training blocks only for that copy. A thread writes, hashes and syncs. `finish` commits, on all ranks
together, as soon as every rank has written, and raises errors of the thread.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from m3i_scale.checkpoint.commit import begin, commit, write_guard
from m3i_scale.checkpoint.layout import BUFFERS, INDEX, TENSORS
from m3i_scale.checkpoint.manifest import Digest, digest_files
from m3i_scale.checkpoint.stream import (
    Range,
    WrittenTensors,
    buffers_of,
    make_index,
    ranges_of,
    shapes_of,
    write_ranges,
    write_tensors,
)
from m3i_scale.checkpoint.tensors import Index
from m3i_scale.engine.agree import from_rank_0, gather_on_rank_0, sum_over_ranks, together
from m3i_scale.engine.averages import ShardedEma
from m3i_scale.engine.engine_state import counters
from m3i_scale.files import write_json

Result = TypeVar("Result")
_ALIGNED = 64
"""Alignment in bytes of the pieces in a pool."""


class BackgroundCall(threading.Thread, Generic[Result]):
    """Work in a daemon thread, so that it does not block process exit."""

    def __init__(self, name: str, work: Callable[[], Result]) -> None:
        super().__init__(name=name, daemon=True)
        self._work, self._future = work, Future[Result]()

    def run(self) -> None:
        """Do the work; `take` raises its errors."""
        try:
            self._future.set_result(self._work())
        except BaseException as error:  # any error is raised by `take`
            self._future.set_exception(error)

    def take(self) -> Result:
        """Wait until the work is done; return its result or raise its error."""
        return self._future.result()


@dataclass
class HostCopies:
    """Host staging buffer for the same tensors at every save.

    An accelerator copies into pinned memory asynchronously. Torch rounds every pinned allocation up to a power of two:
    a separate allocation for a 33 MiB piece would take 64 MiB. So pieces share pools with power-of-two sizes.
    """

    places: list[Tensor] = field(default_factory=list)
    """Tensors of the last copies."""

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return flat copies of flat tensors, in their order; complete once the accelerator is synchronized."""
        wanted = [(tensor.numel(), tensor.dtype) for tensor in tensors]
        if [(place.numel(), place.dtype) for place in self.places] != wanted:
            self.places = []  # so that old and new buffers never coexist
            pins = get_accelerator().device_name() != "cpu"
            self.places = make_places(wanted, _pinned if pins else None)
        return [place.copy_(tensor, non_blocking=True) for place, tensor in zip(self.places, tensors, strict=True)]


def make_places(wanted: Sequence[tuple[int, torch.dtype]], pin: Callable[[int], Tensor] | None) -> list[Tensor]:
    """Allocate flat tensors: one allocation each, or shared pools if they are pinned. `pin` returns pinned memory of a
    size in bytes."""
    if pin is None:
        return [torch.empty(numel, dtype=dtype) for numel, dtype in wanted]
    sizes = [numel * dtype.itemsize for numel, dtype in wanted]
    pools, places = plan_pools(sizes)
    memory = [pin(size) for size in pools]
    return [
        memory[pool][start : start + size].view(dtype)
        for (pool, start), size, (_, dtype) in zip(places, sizes, wanted, strict=True)
    ]


def _pinned(size: int) -> Tensor:
    # Allocated as pinned memory: pinning existing memory would allocate it twice and copy its contents.
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def plan_pools(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the pool sizes, each a power of two, and the (pool, offset) of every piece, for piece sizes in bytes.

    The largest unplaced piece opens a pool. Its size is the largest power of two that the unplaced pieces would fill,
    or the smallest that the piece fits into, whichever is larger. Other pieces that fit are added, larger ones first.
    """
    pools: list[int] = []
    places = [(0, 0)] * len(sizes)
    aligned = {number: -(-size // _ALIGNED) * _ALIGNED for number, size in enumerate(sizes)}
    unplaced = sorted(aligned, key=lambda number: aligned[number], reverse=True)
    while unplaced:
        total, largest = sum(aligned[number] for number in unplaced), aligned[unplaced[0]]
        pool = max(1 << max(total.bit_length() - 1, 0), 1 << max(largest - 1, 0).bit_length())
        at, later = 0, []
        for number in unplaced:
            if at + aligned[number] > pool:
                later.append(number)
                continue
            places[number] = (len(pools), at)
            at += aligned[number]
        pools.append(pool)
        unplaced = later
    return pools, places


@dataclass
class _Save:
    """A save that has begun and is not committed."""

    final: Path
    temporary: Path
    meta: dict[str, Any]
    run_yaml: str
    shapes: dict[str, tuple[int, ...]]
    call: BackgroundCall[WrittenTensors]


@dataclass
class Saver:
    """Checkpoint writer for an engine and its EMA target. Every rank has one and makes the same calls.

    Args:
        background: whether `save` returns before anything is written.
        committed: called on rank 0 after every commit, in a separate thread, so it may be slow.
    """

    engine: Any
    ema: ShardedEma | None
    background: bool = False
    committed: Callable[[Path], object] = lambda final: None
    _copies: HostCopies = field(default_factory=HostCopies)
    _current: _Save | None = None
    _after_commit: BackgroundCall[object] | None = None

    @property
    def pending(self) -> bool:
        """Return whether a save is not committed yet; the same on all ranks."""
        return self._current is not None

    @property
    def writing(self) -> bool:
        """Return whether this rank's thread is still writing."""
        return self._current is not None and self._current.call.is_alive()

    def save(
        self,
        final: Path,
        *,
        data_state: Mapping[str, Any],
        meta: Mapping[str, Any],
        run_yaml: str,
        more: Callable[[Path], object] = lambda folder: None,
    ) -> None:
        """Begin to write `final`, after any earlier save is committed. Collective.

        Args:
            final: `…/checkpoints/step-00000100`.
            data_state: this rank's position in the data; JSON.
            meta: contents of meta.json and the manifest; JSON.
            run_yaml: the config file.
            more: writes further files into the given folder; called on rank 0, in the thread.
        """
        self.finish()
        ranges, buffers = together(
            lambda: (
                ranges_of(self.engine, self.ema),
                buffers_of(self.engine.module) if dist.get_rank() == 0 else {},
            )
        )
        of_rank = sum(piece.nbytes for piece in ranges) + sum(buffer.nbytes for buffer in buffers.values())
        wanted = int(sum_over_ranks([of_rank])[0])
        temporary = Path(from_rank_0(lambda: str(begin(final, wanted))))
        averages = self.ema.online_names() if self.ema is not None else {}
        meta = {**meta, "engine": counters(self.engine), "averages": averages}
        # If a rank has no memory for its copy, all fail: the others would continue and wait for it in the next step.
        call = together(
            lambda: BackgroundCall("checkpoint", self._work(temporary, ranges, buffers, json.dumps(data_state), more))
        )
        save = _Save(final, temporary, meta, run_yaml, shapes_of(self.engine, self.ema), call)
        if self.background:
            call.start()
            self._current = save
        else:
            call.run()
            self._current = save
            self.finish()

    def finish(self) -> Path | None:
        """Wait for the pending save, commit it and return its folder. Collective."""
        if self._current is None:
            return None
        current, self._current = self._current, None
        try:
            digests, index = _gathered(together(current.call.take), current.shapes)
            from_rank_0(lambda: _commit(current, digests, index))
        except Exception:
            # Only now, when no rank writes any more: a folder that vanishes early would hide the root cause.
            from_rank_0(lambda: shutil.rmtree(current.temporary, ignore_errors=True))
            raise
        from_rank_0(lambda: self._begin_after_commit(current.final))
        return current.final

    def close(self) -> None:
        """Commit a pending save and wait for its `committed` callback. Collective."""
        self.finish()
        from_rank_0(self._wait_after_commit)

    def _work(
        self,
        temporary: Path,
        ranges: list[Range],
        buffers: dict[str, Tensor],
        data_state: str,
        more: Callable[[Path], object],
    ) -> Callable[[], WrittenTensors]:
        """Return the function that writes this rank's files, for a background save from copies."""
        rank = dist.get_rank()
        random = {"host": torch.get_rng_state()}
        if get_accelerator().device_name() != "cpu":
            random["accelerator"] = get_accelerator().get_rng_state()
        if self.background:
            copies = iter(self._copies.copy([part.view(-1) for piece in ranges for part in piece.parts]))
            # The thread joins the two halves of EMA weights.
            ranges = [replace(piece, parts=tuple(next(copies) for _ in piece.parts)) for piece in ranges]
            buffers = {name: buffer.detach().clone() for name, buffer in buffers.items()}
            get_accelerator().synchronize()

        def work() -> WrittenTensors:
            with write_guard(temporary.parent, temporary, remove_folder=False):
                small = {f"random/rank-{rank:05d}.safetensors": random} | ({BUFFERS: buffers} if rank == 0 else {})
                position = f"data/rank-{rank:05d}.json"
                for name in (position, *small):
                    (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / position).write_text(data_state, encoding="utf-8")
                if rank == 0:
                    more(temporary)
                written = write_ranges(temporary, ranges, rank)
                written.digests |= {name: write_tensors(temporary / name, values) for name, values in small.items()}
                written.digests |= digest_files(temporary, [position])
                return written

        return work

    def _begin_after_commit(self, final: Path) -> None:
        self._wait_after_commit()
        call = BackgroundCall("after-commit", lambda: self.committed(final))
        call.start()
        self._after_commit = call

    def _wait_after_commit(self) -> None:
        call, self._after_commit = self._after_commit, None
        if call is not None:
            call.take()


def _gathered(written: WrittenTensors, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Digest], Index]:
    """Return the digests of all files and their index, on rank 0. Collective. Pieces that follow from the shapes are
    not sent."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    uneven = [not written.is_even(key, shape, rank, ranks) for key, shape in shapes.items()]
    sums = sum_over_ranks([*(written.squares.get(key, 0.0) for key in shapes), *uneven])
    squares, ranks_with_uneven = sums[: len(shapes)], sums[len(shapes) :]
    listed = [key for key, count in zip(shapes, ranks_with_uneven, strict=True) if count]
    pieces = {key: written.pieces[key] for key in listed if key in written.pieces}
    all_ranks = gather_on_rank_0((written.digests, pieces))
    digests = {name: digest for of_rank, _ in all_ranks for name, digest in of_rank.items()}
    return digests, make_index(shapes, squares, ranks, listed, [of_rank for _, of_rank in all_ranks])


def _commit(save: _Save, digests: dict[str, Digest], index: Index) -> None:
    with write_guard(save.final.parent, save.temporary):
        index.write(save.temporary / TENSORS / INDEX)
        write_json(save.temporary / "meta.json", save.meta)
        (save.temporary / "run.yaml").write_text(save.run_yaml, encoding="utf-8")
    commit(save.final, save.temporary, save.meta, digests=digests)
