"""One job of ranks, forked from a process that has imported everything, and what kills it at a file operation.

A launcher forks the ranks and waits for them, as a real one does; each is the real command line. The hooks are
installed in a forked rank and nowhere else: they count the file operations of a phase of the run, note what has been
committed and pruned, and send SIGKILL at the operation that was drawn.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from m3i_scale.checkpoint import retention, saver, stream
from m3i_scale.checkpoint.layout import step_of
from m3i_scale.cli import main
from m3i_scale.config import RunConfig
from m3i_scale.engine.extensions import keep_to_environment
from m3i_scale.run import flops, train
from m3i_scale.run.check import resolve_run
from m3i_scale.run.hooks import checkpointing

_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
_THREADS = {"checkpoint": "write", "after-commit": "prune"}
SURVIVORS_END_S = 20.0
"""How long a launcher waits for the other ranks of a rank that has died."""


@dataclass(frozen=True)
class Kill:
    """What is killed, and when."""

    victims: str
    """`rank`, `all` (ranks) or `launcher`."""
    rank: int
    """That kills or is killed."""
    phase: str | None = None
    """Whose file operations are counted: `load` (before the first step), `open` (a folder to save into), `write` (the
    thread), `commit`, `prune` (retention). None: at a moment."""
    at: int = 0
    """Which operation of the phase, from 1."""
    after_s: float = 0.0
    """The moment, from the start of the job."""


@dataclass(frozen=True)
class Job:
    """A start of the command line."""

    arguments: list[str]
    ranks: int
    port: int
    folder: Path
    """For the log of every rank, and the ledger that all of them write."""
    kill: Kill | None = None


@dataclass
class _Watch:
    """Of a rank: where it is, and what it has done."""

    rank: int
    kill: Kill | None
    ledger: int
    counts: dict[str, int] = field(default_factory=dict)
    main: list[str] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def note(self, **values: Any) -> None:
        """A line in the ledger, in one write."""
        os.write(self.ledger, (json.dumps({"rank": self.rank, **values}) + "\n").encode())

    def phase(self) -> str | None:
        """Of the thread that asks; the pools that hash and verify belong to the main thread."""
        own = _THREADS.get(threading.current_thread().name)
        return own or (self.main[-1] if self.main else None)

    def point(self, operation: str, name: object) -> None:
        """An operation is about to be done, or just has been."""
        phase = self.phase()
        if phase is None:
            return
        with self.guard:
            self.counts[phase] = self.counts.get(phase, 0) + 1
            kill = self.kill
            if kill is None or (kill.rank, kill.phase, kill.at) != (self.rank, phase, self.counts[phase]):
                return
            self.note(event="kill", phase=phase, operation=operation, name=Path(str(name)).name)
            slay(kill.victims, os.getpgrp(), os.getpid(), os.getppid())

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The main thread is in a phase."""
        self.main.append(phase)
        try:
            yield
        finally:
            self.main.pop()


def slay(victims: str, group: int, rank: int, launcher: int) -> None:
    """SIGKILL."""
    if victims == "all":
        os.killpg(group, signal.SIGKILL)
    else:
        os.kill(rank if victims == "rank" else launcher, signal.SIGKILL)


def warm_up(run: RunConfig) -> None:
    """Do once, before the forks, what every rank would do at its start: late imports, counting the FLOPs, extensions.

    Else a kill may tear the record of an extension's build, and the next ranks would build it for a minute.
    """
    keep_to_environment()
    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # DeepSpeed compiles it at the first engine
    plan = resolve_run(run.model_copy(update={"optim": run.optim.model_copy(update={"micro_batch_size": 8})}), 1)
    flop = flops.step_flop(plan.run, plan.label_sets, plan.vocab_size)
    flops.step_flop = lambda *given: flop


def start(job: Job) -> int:
    """Fork a launcher with its ranks; returns its process id. It ends with the code of the first rank that failed."""
    job.folder.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os._exit(_launch(job))
    return pid


def _launch(job: Job) -> int:
    ranks: list[int] = []
    for rank in range(job.ranks):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, ranks[0] if ranks else 0)
            _be_rank(job, rank)
        os.setpgid(pid, ranks[0] if ranks else pid)
        ranks.append(pid)
    (job.folder / "ranks.json").write_text(json.dumps(ranks), encoding="utf-8")
    code, left, deadline = 0, set(ranks), None
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                code = code or os.waitstatus_to_exitcode(status)
        if code and deadline is None:
            deadline = time.monotonic() + SURVIVORS_END_S
        if deadline is not None and time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return code % 256


def _be_rank(job: Job, rank: int) -> None:
    log = os.open(job.folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    world = {"WORLD_SIZE": job.ranks, "LOCAL_WORLD_SIZE": job.ranks, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in world.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job.port))
    ledger = os.open(job.folder / "ledger.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch = _Watch(rank, job.kill, ledger)
    install(watch)
    sys.argv = ["m3i-scale", *job.arguments]
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    watch.note(event="end", code=code, counts=watch.counts)
    os._exit(code if isinstance(code, int) else 1)


def install(watch: _Watch) -> None:
    """Put the hooks round what this process will do."""
    for module, name in ((train, "find_resume"), (train, "_lock"), (checkpointing, "load_checkpoint")):
        setattr(module, name, _within(watch, "load", getattr(module, name)))
    checkpointing.load_checkpoint = _note_load(watch, checkpointing.load_checkpoint)
    saver.Saver.save = _within(watch, "open", saver.Saver.save)
    saver.Saver.finish = _within(watch, "commit", saver.Saver.finish)
    _write_in_halves(watch)
    _note_commits(watch)
    _note_syncs(watch)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _EVENTS:
            return
        # shutil.rmtree names files relative to an open folder, so those count wherever they are.
        if event in ("os.remove", "os.rmdir") or "checkpoints" in str(arguments[0]):
            watch.point(event, arguments[0])

    sys.addaudithook(hook)


def _within(watch: _Watch, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def wrapped(*given: Any, **named: Any) -> Any:
        with watch.during(phase):
            return real(*given, **named)

    return wrapped


def _note_load(watch: _Watch, real: Callable[..., Any]) -> Callable[..., Any]:
    def noted(folder: Path, *given: Any) -> Any:
        states = real(folder, *given)
        if watch.rank == 0:
            watch.note(event="loaded", step=step_of(folder))
        return states

    return noted


def _write_in_halves(watch: _Watch) -> None:
    real = stream._write_all

    def halved(descriptor: int, data: Any) -> None:
        view = memoryview(data)
        real(descriptor, view[: len(view) // 2])
        watch.point("half a write", os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor, view[len(view) // 2 :])

    stream._write_all = halved


def _note_commits(watch: _Watch) -> None:
    rename, discard = Path.rename, retention.discard

    def noted(path: Path, target: Any) -> Path:
        there = rename(path, target)
        if step_of(Path(target)) is not None:
            watch.note(event="committed", step=step_of(Path(target)))
            watch.point("renamed", target)
        return there

    def pruned(path: Path) -> None:
        watch.note(event="pruned", step=step_of(path))
        discard(path)

    Path.rename = noted  # type: ignore[method-assign]
    retention.discard = pruned


def _note_syncs(watch: _Watch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        watch.point("fsync", name)
        real(descriptor)
        watch.point("fsynced", name)

    os.fsync = fsync
