"""Asynchronous checkpoints: copy to a host staging buffer, and write the copy in a thread.

`save` opens the folder and, for background saves, copies this rank's state into a host staging buffer that is reused by
the next save; training blocks only for that copy. A thread writes, hashes and syncs. `finish` commits, on all ranks
together, as soon as every rank has written, and raises errors of the thread.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from m3i_scale.checkpoint.commit import begin, commit, write_guard
from m3i_scale.checkpoint.host_copies import HostCopies
from m3i_scale.checkpoint.layout import BUFFERS, INDEX, TENSORS
from m3i_scale.checkpoint.manifest import Digest, digest_files
from m3i_scale.checkpoint.stream import Range, WrittenTensors, make_index, write_ranges, write_tensors
from m3i_scale.checkpoint.tensors import AVERAGE, Index
from m3i_scale.engine.agree import from_rank_0, gather_on_rank_0, sum_over_ranks, together
from m3i_scale.engine.averages import ShardedEma
from m3i_scale.engine.deepspeed.rules import BYTES, precision, state_bytes
from m3i_scale.engine.engine_state import MASTER, bytes_per_parameter, counters, moment_kinds, pieces, trained
from m3i_scale.engine.partition import full_numel, full_shape, local_range, local_shard, saved_frozen
from m3i_scale.files import write_json
from m3i_scale.objective.information import role_of

Result = TypeVar("Result")


class BackgroundCall(threading.Thread, Generic[Result]):
    """Work in a daemon thread, so that it does not block process exit."""

    def __init__(self, name: str, work: Callable[[], Result]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._results: list[Result] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the work; `take` raises its errors."""
        try:
            self._results = [self._work()]
        except BaseException as error:  # any error is raised by `take`
            self._error = error

    def wait(self) -> None:
        """Wait until the work is done. If no thread was started, the work has already run."""
        if self.ident is not None:
            self.join()

    def take(self) -> Result:
        """Wait, and return the result of the work or raise its error."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]


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
        wanted = checkpoint_bytes(self.engine, self.ema)
        temporary = Path(from_rank_0(lambda: str(begin(final, wanted))))
        averages = self.ema.online_names() if self.ema is not None else {}
        meta = {**meta, "engine": counters(self.engine), "averages": averages}
        # If a rank has no memory for its copy, all fail: the others would continue and wait for it in the next step.
        call = together(lambda: BackgroundCall("checkpoint", self._work(temporary, json.dumps(data_state), more)))
        self._current = _Save(final, temporary, meta, run_yaml, shapes_of(self.engine, self.ema), call)
        if self.background:
            call.start()
        else:
            call.run()
            self.finish()

    def finish(self) -> Path | None:
        """Wait for the pending save, commit it and return its folder. Collective."""
        if self._current is None:
            return None
        current, self._current = self._current, None
        current.call.wait()
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

    def _work(self, temporary: Path, data_state: str, more: Callable[[Path], object]) -> Callable[[], WrittenTensors]:
        """Return the function that writes this rank's files, for a background save from copies."""
        rank = dist.get_rank()
        random = random_states()
        ranges = ranges_of(self.engine, self.ema)
        buffers = buffers_of(self.engine.module) if rank == 0 else {}
        if self.background:
            ranges = self._copied(ranges)
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

    def _copied(self, ranges: list[Range]) -> list[Range]:
        """Return copies of the pieces; the thread joins the two halves of EMA weights."""
        copies = iter(self._copies.copy([part.view(-1) for piece in ranges for part in piece.parts]))
        return [replace(piece, parts=tuple(next(copies) for _ in piece.parts)) for piece in ranges]

    def _begin_after_commit(self, final: Path) -> None:
        self._wait_after_commit()
        self._after_commit = BackgroundCall("after-commit", lambda: self.committed(final))
        self._after_commit.start()

    def _wait_after_commit(self) -> None:
        call, self._after_commit = self._after_commit, None
        if call is not None:
            call.take()


def ranges_of(engine: Any, ema: ShardedEma | None) -> list[Range]:
    """Return the pieces that this rank writes, as live views: master weights, moments, frozen weights, EMA weights."""
    ranges = [
        Range(f"{kind}/{piece.name}", piece.start, (view,))
        for piece in pieces(engine)
        for kind, view in piece.tensors.items()
    ]
    ranges += [
        Range(f"{MASTER}/{name}", local_range(parameter)[0], (piece,))
        for name, parameter in saved_frozen(engine.module).items()
        if (piece := local_shard(parameter)).numel()
    ]
    if ema is not None:
        ranges += [
            Range(f"{AVERAGE}/{name}", start, ema.parts(name, start, numel))
            for name, start, numel in ema.pieces()
            if numel
        ]
    return ranges


def shapes_of(engine: Any, ema: ShardedEma | None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the ranks write together, by key; the same on all ranks."""
    learnt = {name: tuple(full_shape(parameter)) for name, parameter in trained(engine.module)}
    shapes = {f"{kind}/{name}": shape for kind in (MASTER, *moment_kinds(engine)) for name, shape in learnt.items()}
    for name, parameter in saved_frozen(engine.module).items():
        shapes[f"{MASTER}/{name}"] = tuple(full_shape(parameter))
    if ema is not None:
        shapes |= {f"{AVERAGE}/{name}": tuple(shape) for name, shape in ema.shapes().items()}
    return shapes


def checkpoint_bytes(engine: Any, ema: ShardedEma | None) -> int:
    """Return the size of a checkpoint's tensors: weights and two moments of trained parameters, frozen weights, fp32
    EMA weights, buffers."""
    frozen = sum(full_shape(p).numel() * p.element_size() for p in saved_frozen(engine.module).values())
    averaged = sum(math.prod(shape) for shape in ema.shapes().values()) if ema is not None else 0
    remembered = sum(buffer.nbytes for buffer in buffers_of(engine.module).values())
    trained = bytes_per_parameter(engine) * full_numel(engine.module, trainable_only=True)
    return trained + frozen + 4 * averaged + remembered


def expected_bytes(objective: nn.Module, config: dict[str, Any]) -> int:
    """Return `checkpoint_bytes` from the complete model, e.g. on `meta`, and the resolved DeepSpeed config, without an
    engine."""
    master, moment = state_bytes(config)
    sizes = {"trained": master + 2 * moment, "momentum": 4, "teacher": 0, "frozen": BYTES[precision(config)]}
    total = sum(sizes[role_of(name, parameter)] * parameter.numel() for name, parameter in objective.named_parameters())
    return total + sum(buffer.nbytes for buffer in buffers_of(objective).values())


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the live persistent buffers by name, the same on all ranks."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def random_states() -> dict[str, Tensor]:
    """Return the random states of this rank."""
    states = {"host": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        states["accelerator"] = get_accelerator().get_rng_state()
    return states


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
