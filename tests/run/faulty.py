"""Runs of two ranks with faults in their saves, each rank a fork of one process: `python faulty.py CALLS.json RESULTS`.

A call is {"arguments": […], "faults": [{"rank": 1, "what": …, …}, …]}; RESULTS/NUMBER-RANK.json is {"code", "text"}.
A fault's `step` is that of the save whose writing meets it, in the thread that writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import preload
from launch import free_port

from m3i_scale.__main__ import run
from m3i_scale.checkpoint import saver, stream
from m3i_scale.checkpoint.tensors import SavedTensors
from m3i_scale.data.loader import TrainStream
from m3i_scale.errors import DataError, UserError
from m3i_scale.objective.information import Objective
from m3i_scale.run.callbacks.loggers import MetricsWriter
from m3i_scale.run.hooks import Preemption
from m3i_scale.run.trainer import Trainer

WORLD, AT_A_TIME = 2, 2
HEARD: list[int] = []
NOTE = Preemption._note


def note(preemption: Preemption, number: int, frame: Any) -> None:
    HEARD.append(number)
    NOTE(preemption, number, frame)


def install(faults: list[dict[str, Any]], rank: int) -> None:
    Preemption._note = note
    for fault in faults:
        if fault["rank"] == rank:
            {"write": meets, "step": at_a_step, "read": cannot_read, "copy": has_no_memory}[fault["at"]](fault)


def meets(fault: dict[str, Any]) -> None:
    """Something happens in the thread, before it writes its tensors; the next step does not begin before, nor, with
    `awaited`, before the thread has ended."""
    real, next_batch, met = saver.write_ranges, Trainer._next_batch, threading.Event()

    def faulty(folder: Path, *given: Any) -> Any:
        if folder.name.endswith(f"{fault['step']:08d}") or fault["step"] == 0:
            HAPPENS[fault["what"]](fault, folder, met)
        return real(folder, *given)

    def fetched(trainer: Trainer) -> Any:
        if trainer.state.step >= fault["step"] > 0:
            met.wait()
            while fault.get("awaited") and trainer.checkpointing._saver.writing:
                time.sleep(0.01)
        return next_batch(trainer)

    saver.write_ranges, Trainer._next_batch = faulty, fetched


def refuse(fault: dict[str, Any], folder: Path, met: threading.Event) -> None:
    """Half of a tensor arrives."""
    met.set()
    write_all = stream._write_all

    def refused(descriptor: int, data: Any) -> None:
        write_all(descriptor, memoryview(data)[: len(data) // 2])
        raise OSError(fault["errno"], os.strerror(fault["errno"]))

    stream._write_all = refused


def fill(fault: dict[str, Any], folder: Path, met: threading.Event) -> None:
    """A stranger takes the rest of the disk."""
    met.set()
    with (folder.parent.parent / "stranger").open("wb") as file:
        try:
            while True:
                file.write(b"\0" * 4096)
                file.flush()
        except OSError:
            return


def nothing(fault: dict[str, Any], folder: Path, met: threading.Event) -> None:
    met.set()


def sleep(fault: dict[str, Any], folder: Path, met: threading.Event) -> None:
    met.set()
    time.sleep(fault["seconds"])
    (folder.parent.parent / "slept").touch()


def signals(fault: dict[str, Any], folder: Path, met: threading.Event) -> None:
    for count, number in enumerate(fault["numbers"], start=1):
        os.kill(os.getpid(), number)
        while len(HEARD) < count:  # of two that arrive at once only one is heard
            time.sleep(0.01)
        met.set()
        time.sleep(0.3)
    sleep(fault, folder, met)


HAPPENS: dict[str, Callable[[dict[str, Any], Path, threading.Event], None]] = {
    "refuse": refuse,
    "fill": fill,
    "nothing": nothing,
    "sleep": sleep,
    "signals": signals,
}


def at_a_step(fault: dict[str, Any]) -> None:
    """The run must end, at a step, while a save is being written."""
    at = {"step": 0}
    next_batch, forward, on_step = Trainer._next_batch, Objective.forward, MetricsWriter.on_step
    begun = TrainStream.__iter__

    def fetched(trainer: Trainer) -> Any:
        at["step"] = trainer.state.step + 1
        if (fault["what"], at["step"]) == ("data", fault["step"]):
            trainer.fetcher._error = DataError("a shard is gone")
        return next_batch(trainer)

    def streamed(stream: TrainStream) -> Any:
        """With `epochs`, the batches of a step are asked for before it begins."""
        for number, batch in enumerate(begun(stream), start=1):
            if (fault["what"], number) == ("supply", fault["step"]):
                raise DataError("a shard is gone")
            yield batch

    def computed(objective: Objective, batch: Any, step: Any = None) -> Any:
        loss, figures = forward(objective, batch, step)
        bad = (fault["what"], at["step"], objective.training) == ("nan", fault["step"], True)
        return (loss * float("nan") if bad else loss), figures

    def told(writer: MetricsWriter, record: Any) -> None:
        if (fault["what"], record.step) == ("metrics", fault["step"]):
            raise UserError("cannot write the metrics: no")
        on_step(writer, record)

    Trainer._next_batch, Objective.forward, MetricsWriter.on_step = fetched, computed, told
    TrainStream.__iter__ = streamed


def cannot_read(fault: dict[str, Any]) -> None:
    def read(saved: SavedTensors, key: str, start: int, out: Any) -> None:
        raise OSError(fault["errno"], os.strerror(fault["errno"]), str(saved.folder / "rank-00001-00000.safetensors"))

    SavedTensors.read_into = read


def has_no_memory(fault: dict[str, Any]) -> None:
    def copy(*given: Any) -> None:
        raise MemoryError("no memory for a copy")

    saver.HostCopies.copy = copy


def be_rank(call: dict[str, Any], rank: int, port: int, log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, rank, WORLD, WORLD, port)), strict=True), MASTER_ADDR="127.0.0.1")
    install(call["faults"], rank)
    sys.argv = ["m3i-scale", *call["arguments"]]
    try:
        run()  # ends the process
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def start(call: dict[str, Any], number: int, results: Path) -> dict[int, Path]:
    """Process ids, and where the result of each goes."""
    ranks, port = {}, free_port()
    for rank in range(WORLD):
        result = results / f"{number}-{rank}.json"
        pid = os.fork()
        if pid == 0:
            be_rank(call, rank, port, result.with_suffix(".log"))
        ranks[pid] = result
    return ranks


def run_all(calls: list[dict[str, Any]], results: Path) -> None:
    running: list[dict[int, Path]] = []
    for number, call in enumerate(calls):
        running.append(start(call, number, results))
        wait_until(running, AT_A_TIME - 1)
    wait_until(running, 0)


def wait_until(running: list[dict[int, Path]], left: int) -> None:
    while len(running) > left:
        pid, status = os.wait()
        for ranks in running:
            if (result := ranks.pop(pid, None)) is not None:
                text = result.with_suffix(".log").read_text()
                result.write_text(json.dumps({"code": os.waitstatus_to_exitcode(status), "text": text}))
        running[:] = [ranks for ranks in running if ranks]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    preload()
    run_all(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
