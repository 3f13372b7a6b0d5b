"""Save while the training goes on: a copy in host memory, and a thread that writes it.

A save has three parts. `save` opens the folder and, where it writes in the background, copies what this rank holds into
host memory that is kept for the next save: so long the training stands still. A thread writes, hashes and syncs.
`finish` commits, on all ranks together, as soon as every rank has written; errors of the thread surface there.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file
from torch import Tensor

from m3i_scale.scale.checkpoint.commit import begin, commit, digest_files, ensure_space, write_guard
from m3i_scale.scale.checkpoint.host_copies import HostCopies
from m3i_scale.scale.checkpoint.state import (
    BUFFERS,
    buffers_of,
    bytes_wanted,
    random_states,
    ranges_of,
    write_small_files,
)
from m3i_scale.scale.checkpoint.tensors import Range, Written, write_index, write_ranges
from m3i_scale.scale.checkpoint.together import from_rank_0, together
from m3i_scale.scale.engine_state import counters
from m3i_scale.scale.partition import ShardedMomentum


@dataclass
class _Save:
    """One save on its way."""

    final: Path
    temporary: Path
    meta: dict[str, Any]
    run_yaml: str
    written: Written | None = None
    fault: BaseException | None = None
    thread: threading.Thread | None = None


@dataclass
class Saver:
    """Writes checkpoints of an engine and its momentum target; every rank has one and calls the same.

    Args:
        engine: the DeepSpeed engine.
        momentum: its averages.
        background: whether `save` returns before anything is written.
        committed: called on rank 0 after every commit, in a thread of its own: it may take its time.
    """

    engine: Any
    momentum: ShardedMomentum | None
    background: bool = False
    committed: Callable[[Path], object] = lambda final: None
    _kept: HostCopies = field(default_factory=HostCopies)
    _now: _Save | None = None
    _after: threading.Thread | None = None
    _after_fault: BaseException | None = None

    @property
    def pending(self) -> bool:
        """Whether a save has been begun and not committed; the same on all ranks."""
        return self._now is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is still at it."""
        return self._now is not None and self._now.thread is not None and self._now.thread.is_alive()

    def save(
        self,
        final: Path,
        *,
        data_state: Mapping[str, Any],
        meta: Mapping[str, Any],
        run_yaml: str,
        more: Callable[[Path], object] = lambda folder: None,
    ) -> None:
        """Begin to write `final`; a save that is still on its way is waited for. Collective.

        Args:
            final: `…/checkpoints/step-00000100`.
            data_state: this rank's position in the data; JSON.
            meta: what meta.json and the manifest say; JSON.
            run_yaml: the run file.
            more: writes further files into the folder it is given; called on rank 0, in the thread.

        Raises:
            CheckpointError: the disk refused; what was committed before is untouched.
        """
        self.finish()
        wanted = bytes_wanted(self.engine, self.momentum)
        from_rank_0(lambda: ensure_space(final.parent, wanted))
        temporary = Path(from_rank_0(lambda: str(begin(final))))
        averages = self.momentum.online_names() if self.momentum is not None else {}
        now = _Save(final, temporary, {**meta, "engine": counters(self.engine), "averages": averages}, run_yaml)
        # A rank that has no memory for its copy ends all: the others would go on, and wait for it in the next step.
        work = together(lambda: self._work(now, json.dumps(data_state), more))
        self._now = now
        if not self.background:
            work()
            self.finish()
            return
        now.thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        now.thread.start()

    def finish(self) -> Path | None:
        """Wait for the save that is on its way, and commit it. Collective; returns what was committed.

        Raises:
            CheckpointError: a rank could not write; on all ranks.
        """
        if self._now is None:
            return None
        now, self._now = self._now, None
        if now.thread is not None:
            now.thread.join()
        try:
            together(lambda: _raise(now.fault))
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, now.written)
            from_rank_0(lambda: _commit(now, parts))
        except Exception:
            # Only now, when no rank is writing any more: a folder that vanishes early would hide the first cause.
            from_rank_0(lambda: shutil.rmtree(now.temporary, ignore_errors=True))
            raise
        from_rank_0(lambda: self._afterwards(now.final))
        return now.final

    def close(self) -> None:
        """Commit what is on its way, and wait for what follows a commit. Collective.

        Raises:
            CheckpointError: see `finish`, or what follows a commit has failed.
        """
        self.finish()
        from_rank_0(self._wait_afterwards)

    def _work(self, now: _Save, data_state: str, more: Callable[[Path], object]) -> Callable[[], None]:
        """What writes this rank's files; with copies of everything that training changes, where it does so later."""
        rank, random = dist.get_rank(), random_states()
        ranges = ranges_of(self.engine, self.momentum)
        buffers = buffers_of(self.engine.module) if rank == 0 else {}
        if self.background:
            ranges = self._copied(ranges)
            buffers = {name: buffer.detach().clone() for name, buffer in buffers.items()}
            get_accelerator().synchronize()

        def work() -> None:
            try:
                with write_guard(now.final.parent, now.temporary, remove_folder=False):
                    small = write_small_files(now.temporary, data_state, random, rank)
                    if rank == 0:
                        whole = {name: buffer.detach().cpu().contiguous() for name, buffer in buffers.items()}
                        save_file(whole, now.temporary / BUFFERS)
                        more(now.temporary)
                    written = write_ranges(now.temporary, ranges, rank)
                    written.digests |= digest_files(now.temporary, small)
                    now.written = written
            except BaseException as error:  # whatever it is, it is raised where the save is finished
                now.fault = error

        return work

    def _copied(self, ranges: list[Range]) -> list[Range]:
        """Pieces that read from copies of now; an average in two halves is joined by the thread."""
        parts = [piece.parts() if piece.parts is not None else (piece.read(),) for piece in ranges]
        copies = iter(self._kept.copy([part.view(-1) for of_piece in parts for part in of_piece]))
        return [
            replace(piece, read=_reader(piece, [next(copies) for _ in of_piece]))
            for piece, of_piece in zip(ranges, parts, strict=True)
        ]

    def _afterwards(self, final: Path) -> None:
        self._wait_afterwards()

        def work() -> None:
            try:
                self.committed(final)
            except BaseException as error:  # raised at the next commit, or at the end
                self._after_fault = error

        self._after = threading.Thread(target=work, name="after-commit", daemon=True)
        self._after.start()

    def _wait_afterwards(self) -> None:
        if self._after is not None:
            self._after.join()
        fault, self._after_fault = self._after_fault, None
        _raise(fault)


def save_checkpoint(
    final: Path,
    engine: Any,
    momentum: ShardedMomentum | None,
    *,
    data_state: Mapping[str, Any],
    meta: Mapping[str, Any],
    run_yaml: str,
) -> None:
    """Write and commit `final` at once; every rank calls it. Errors of any rank are raised on all.

    Raises:
        CheckpointError: the disk refused; what was committed before is untouched.
    """
    Saver(engine, momentum).save(final, data_state=data_state, meta=meta, run_yaml=run_yaml)


def _commit(now: _Save, parts: list[Written]) -> None:
    with write_guard(now.final.parent, now.temporary):
        write_index(now.temporary, parts)
        (now.temporary / "meta.json").write_text(json.dumps(now.meta, indent=1), encoding="utf-8")
        (now.temporary / "run.yaml").write_text(now.run_yaml, encoding="utf-8")
    digests = {name: digest for part in parts for name, digest in part.digests.items()}
    commit(now.final, now.temporary, now.meta, digests=digests)


def _reader(piece: Range, copies: list[Tensor]) -> Callable[[], Tensor]:
    join = piece.join
    return (lambda: join(*copies)) if join is not None else (lambda: copies[0])


def _raise(fault: BaseException | None) -> None:
    if fault is not None:
        raise fault
