"""Run the agent of one host: start its ranks, forward their output, report how they end, and leave no process.

`python -m m3i_scale.launch.agent` runs over ssh and exchanges messages of `wire` on standard input and output. It ends
its ranks on request, or when its input ends (the supervisor or the connection is gone). It also ends them when it
receives nothing for too long (the network is down). The kernel kills the ranks if the agent is killed. It imports
neither torch nor DeepSpeed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO

import psutil

from m3i_scale import __version__
from m3i_scale.launch.doctor.facts import code
from m3i_scale.launch.doctor.machine import rank_memory
from m3i_scale.launch.heartbeat import RECORDS
from m3i_scale.launch.processes import MARK, end_marked, marked, process_tag
from m3i_scale.launch.rank import Rank
from m3i_scale.launch.wire import AGENT_SILENCE, BEAT_S, Message, Writer, decode

_TICK_S = 0.1
_CHUNK = 1 << 16
_HEARTBEAT_TIMEOUT_S = 60.0
"""Heartbeat timeout until the supervisor sets one."""
_PREFIX = "m3i-scale-agent-"
_YOUNG_S = 60.0
"""A younger folder without a lock may be about to be locked."""


class Agent:
    """The agent of one attempt on one host.

    Args:
        output: output stream to the supervisor.
    """

    def __init__(self, output: IO[bytes]) -> None:
        self.writer = Writer(output)
        self.ranks: list[Rank] = []
        self.selector = selectors.DefaultSelector()
        self.heard = time.monotonic()
        self.silence_s = _HEARTBEAT_TIMEOUT_S
        self.host = self.launch = self.output_dir = ""
        self.records: Path | None = None
        self.over = False
        self._input = b""
        self._beat = 0.0

    def serve(self) -> None:
        """Serve until all ranks have ended or must end."""
        self.selector.register(0, selectors.EVENT_READ, None)
        try:
            while not self.over:
                for key, _ in self.selector.select(_TICK_S):
                    self._read_input() if key.data is None else self._read_rank(key.data)
                self._poll()
        finally:
            self._end()

    def _read_input(self) -> None:
        data = os.read(0, _CHUNK)
        if not data:
            self.over = True
            return
        self.heard = time.monotonic()
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            message = decode(line)
            if message is not None:
                self._obey(message)

    def _obey(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "hello":
            self._greet(message)
        elif kind == "port":
            self._say_port(message["port"], message["interface"])
        elif kind == "clock":
            self.writer.send("clock", time=time.time())
        elif kind == "memory":
            memory = rank_memory(message["slots"], on_host=message["on_host"])
            self.writer.send("memory", **asdict(memory))
            self.heard = time.monotonic()  # the memory query may have taken seconds
        elif kind == "start":
            self._start(message)
        elif kind == "signal":
            for rank in self.ranks:
                rank.signal(message["number"])
        elif kind == "end":
            self.over = True

    def _greet(self, message: Message) -> None:
        """Report this host's facts, and the processes left by an earlier launch."""
        self.host, self.launch = message["host"], message["launch"]
        self.output_dir, self.silence_s = message["output_dir"], message["silence_s"] * AGENT_SILENCE
        left = [asdict(process) for process in marked(self.host, self.output_dir) if process.launch != self.launch]
        end_marked(self.launch, self.host, self.output_dir)  # from an earlier attempt with a killed agent
        fault = None
        try:
            self.records = _folder_for_records()
            self._held = _hold(self.records)  # locked until this process ends
        except OSError as error:
            fault = f"no room for the heartbeats of its ranks: {error}"
        facts = {"version": __version__, "code": code(), "time": time.time(), "pid": os.getpid()}
        self.writer.send("hello", **facts, left=left, fault=fault)

    def _say_port(self, wanted: int | None, interface: str | None) -> None:
        """Report a free port for rank 0's store, and the address of the interface."""
        cards = psutil.net_if_addrs()
        addresses = [item.address for item in cards.get(interface or "", []) if item.family == socket.AF_INET]
        fault = f"there is no interface '{interface}' with an IPv4 address" if interface and not addresses else None
        port = wanted
        with socket.socket() as probe:
            # As rank 0 does: connections of the previous attempt keep the port for a minute after their end.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", wanted or 0))
                port = probe.getsockname()[1]
            except OSError as error:
                fault = f"port {wanted}: {error.strerror}"
        self.writer.send("port", port=port, address=addresses[0] if addresses else None, fault=fault)

    def _start(self, message: Message) -> None:
        if self.records is None:
            raise RuntimeError("no folder for records")
        variables = os.environ | message["environment"]
        variables[MARK] = process_tag(self.launch, self.host, self.output_dir)
        variables.setdefault("PYTHONUNBUFFERED", "1")  # the last lines before a kill matter most
        variables[RECORDS] = str(self.records)
        for place in message["ranks"]:
            rank = Rank(int(place["RANK"]), message["command"], variables | place, message["cwd"], self.records)
            self.ranks.append(rank)
            self.selector.register(rank.output, selectors.EVENT_READ, rank)
        self.writer.send("started", time=time.time())

    def _read_rank(self, rank: Rank) -> None:
        data = os.read(rank.output.fileno(), _CHUNK)
        if data:
            self.writer.log(rank.number, data)
            rank.remember(data)
        else:
            self.selector.unregister(rank.output)

    def _poll(self) -> None:
        """Report changes since the last poll."""
        for rank in self.ranks:
            if rank.ended():
                self._drain(rank)
                seen = rank.seen()
                beat = asdict(seen) if seen else None
                self.writer.send("exit", rank=rank.number, code=rank.code, failure=rank.failure(self.host), beat=beat)
        now = time.monotonic()
        if now - self._beat > BEAT_S:
            self._beat = now
            self.writer.send("beat", time=time.time(), beats=self._beats())
        if now - self.heard > self.silence_s or self.writer.broken:
            self.over = True

    def _drain(self, rank: Rank) -> None:
        """Read the remaining output of an ended rank; one of its children may keep the pipe open."""
        os.set_blocking(rank.output.fileno(), False)
        with contextlib.suppress(BlockingIOError, OSError):
            while data := os.read(rank.output.fileno(), _CHUNK):
                self.writer.log(rank.number, data)
                rank.remember(data)
        with contextlib.suppress(KeyError):
            self.selector.unregister(rank.output)

    def _beats(self) -> dict[int, object]:
        beats: dict[int, object] = {}
        for rank in self.ranks:
            seen = rank.seen() if rank.code is None else None
            if seen is not None:
                beats[rank.number] = asdict(seen)
        return beats

    def _end(self) -> None:
        """End all processes of this launch on this host, in any case."""
        for rank in self.ranks:
            rank.kill()
        pids = end_marked(self.launch, self.host, self.output_dir) if self.launch else []
        for rank in self.ranks:
            if rank.code is None and rank.ended():
                self._drain(rank)
        if self.records is not None:
            shutil.rmtree(self.records, ignore_errors=True)
        self.writer.send("bye", left=pids)
        self.writer.close()


def _folder_for_records() -> Path:
    """Create a folder for records, in memory if possible: a full disk must not prevent a rank from reporting it.

    Raises:
        OSError: it can be created neither there nor in the folder for temporary files.
    """
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    _sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        (folder / "room").write_bytes(bytes(1 << 16))
        (folder / "room").unlink()
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _sweep(parent: Path) -> None:
    """Remove the folders of killed agents. A running agent holds a lock, which is visible from any container."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            young = time.time() - folder.stat().st_mtime < _YOUNG_S
            descriptor = _hold(folder)
        except OSError:  # locked, owned by another user, or removed
            continue
        if not young:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _hold(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def main() -> None:
    """Serve the supervisor over standard input and output."""
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # other output must not mix with messages
    sys.stdout.flush()
    Agent(output).serve()


if __name__ == "__main__":
    main()
