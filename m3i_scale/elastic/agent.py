"""Run the agent of one host: start its ranks, forward their output, report how they end, and leave no process.

`python -m m3i_scale.elastic.agent` runs over ssh and exchanges messages of `wire` on standard input and output. It ends
its ranks on request, when its input ends (the supervisor or the connection is gone), or when it receives nothing for
too long (the network is down). If it is killed, the kernel kills the ranks. It imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import psutil

from m3i_scale import __version__
from m3i_scale.elastic.wire import AGENT_SILENCE, BEAT_S, Message, Writer, decode
from m3i_scale.errors import EXIT_PREEMPTED
from m3i_scale.host.failures import LAST_LINES, Failure, explain_exit_code
from m3i_scale.host.processes import MARK, end_marked, marked, oom_kills, process_tag
from m3i_scale.host.rank_record import RECORDS, RankState, heartbeat_file, read_heartbeat, read_record, record_file
from m3i_scale.run.software import code

_TICK_S = 0.1
_PREFIX = "m3i-scale-agent-"
_START_S = 3600.0
"""Age of a record folder without an owner that is not about to get one."""
_OWNER = "owner"
_CHUNK = 1 << 16
_HEARTBEAT_TIMEOUT_S = 60.0
"""Heartbeat timeout until the supervisor sets one."""
_LINE_BYTES = 2000
_KILL_S = 5.0


class Rank:
    """The process of one rank. `environment` is complete; `records` is the folder of its heartbeat and error file."""

    def __init__(
        self, number: int, command: Sequence[str], environment: Mapping[str, str], cwd: str, records: Path
    ) -> None:
        self.number = number
        self.code: int | None = None
        self._records = records
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._part = ""
        self._ooms = oom_kills()
        tied = [sys.executable, "-m", "m3i_scale.host.processes", str(os.getpid()), *command]
        self._process = subprocess.Popen(
            tied,
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
        )
        if self._process.stdout is None:
            raise RuntimeError("no pipe")
        self.output = self._process.stdout

    def remember(self, data: bytes) -> None:
        """Append output to the last lines. Of a progress bar, which overwrites its line, keep the last state."""
        *complete, self._part = (self._part + data.decode(errors="replace")).split("\n")
        lines = [line.rstrip("\r").rpartition("\r")[2][:_LINE_BYTES] for line in complete]
        self._lines.extend(line for line in lines if line.strip())
        self._part = self._part[-_LINE_BYTES:]

    def ended(self) -> bool:
        """Return whether the rank has ended since the last call."""
        if self.code is not None:
            return False
        self.code = self._process.poll()
        return self.code is not None

    def signal(self, number: int) -> None:
        """Send a signal to the rank only, not to its data loader workers: the rank ends those."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the rank and its process group. If it has ended, its pid may be reused; `end_marked` finds the rest."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> None:
        """Wait until the rank has ended, or for `timeout_s`: it can be in a system call that does not return."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def state(self) -> RankState | None:
        """Return the last known state of the rank; None before its first heartbeat."""
        return read_heartbeat(heartbeat_file(self._records, self.number))

    def failure(self, host: str) -> dict[str, Any] | None:
        """Return the failure of the rank; None if it ended normally."""
        if self.code in (0, EXIT_PREEMPTED) or self.code is None:
            return None
        lines = [*self._lines, *([self._part] if self._part.strip() else [])][-LAST_LINES:]
        record = read_record(record_file(self._records, self.number))
        if record is not None:
            return asdict(replace(record, host=host, exit_code=self.code, lines=lines))
        state = self.state() or RankState(-1, -1, "start", 0.0, 0.0)
        kind, message = explain_exit_code(self.code)
        error_line = next((line.strip() for line in reversed(lines) if "error" in line.lower()), "")
        if self.code == -signal.SIGKILL:
            message += self._memory_text()
        elif kind == "exit" and error_line:
            message += f": {error_line}"
        return asdict(Failure(time.time(), host, self.number, state.step, state.phase, kind, message, self.code, lines))

    def _memory_text(self) -> str:
        now = oom_kills()
        if now is None or self._ooms is None:
            return ": likely the kernel's, out of memory (this host does not say)"
        if now > self._ooms:
            return f": out of memory (the kernel of this host has killed {now - self._ooms} for it meanwhile)"
        return ": out of memory is the usual reason, but the kernel of this host counts no such kill (/proc/vmstat)"


class Agent:
    """The agent of one attempt on one host. `output` is the stream to the supervisor."""

    def __init__(self, output: IO[bytes]) -> None:
        self.writer = Writer(output)
        self.ranks: list[Rank] = []
        self.selector = selectors.DefaultSelector()
        self.last_message = time.monotonic()
        self.silence_s = _HEARTBEAT_TIMEOUT_S
        self.host = self.launch = self.output_dir = ""
        self.records: Path | None = None
        self._owner: IO[bytes] | None = None
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
        self.last_message = time.monotonic()
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            message = decode(line)
            if message is not None:
                self._handle(message)

    def _handle(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "hello":
            self._send_hello(message)
        elif kind == "port":
            self._send_port(message["port"], message["interface"])
        elif kind == "start":
            self._start(message)
        elif kind == "signal":
            for rank in self.ranks:
                rank.signal(message["number"])
        elif kind == "end":
            self.over = True

    def _send_hello(self, message: Message) -> None:
        self.host, self.launch = message["host"], message["launch"]
        self.output_dir, self.silence_s = message["output_dir"], message["silence_s"] * AGENT_SILENCE
        left = [asdict(process) for process in marked(self.host, self.output_dir) if process.launch != self.launch]
        error = None
        if pids := end_marked(self.launch, self.host, self.output_dir):  # from an earlier attempt
            error = f"processes of an earlier attempt cannot be killed: {', '.join(map(str, pids))}"
        try:
            self.records, self._owner = _create_record_folder()
        except OSError as cause:
            error = f"no folder for the heartbeats of its ranks: {cause}"
        facts = {"version": __version__, "code": code(), "time": time.time(), "pid": os.getpid()}
        self.writer.send("hello", **facts, left=left, error=error)

    def _send_port(self, port: int | None, interface: str | None) -> None:
        """Report a free port for rank 0's store, and the address of the interface."""
        cards = psutil.net_if_addrs()
        addresses = [item.address for item in cards.get(interface or "", []) if item.family == socket.AF_INET]
        error = f"there is no interface '{interface}' with an IPv4 address" if interface and not addresses else None
        with socket.socket() as probe:
            # As rank 0 does: connections of the previous attempt keep the port for a minute after their end.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port or 0))
                port = probe.getsockname()[1]
            except OSError as cause:
                error = f"port {port}: {cause.strerror}"
        self.writer.send("port", port=port, address=addresses[0] if addresses else None, error=error)

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
        for rank in self.ranks:
            if rank.ended():
                self._drain(rank)
                state = rank.state()
                beat = asdict(state) if state else None
                self.writer.send("exit", rank=rank.number, code=rank.code, failure=rank.failure(self.host), beat=beat)
        now = time.monotonic()
        if now - self._beat > BEAT_S:
            self._beat = now
            states = {rank.number: rank.state() for rank in self.ranks if rank.code is None}
            beats = {number: asdict(state) for number, state in states.items() if state is not None}
            self.writer.send("beat", time=time.time(), beats=beats)
        if now - self.last_message > self.silence_s or self.writer.broken:
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

    def _end(self) -> None:
        """End all processes of this launch on this host, in any case."""
        for rank in self.ranks:
            rank.kill()
        deadline = time.monotonic() + _KILL_S  # of all ranks: the supervisor does not wait long for `bye`
        for rank in self.ranks:
            rank.wait(max(deadline - time.monotonic(), 0))
        pids = end_marked(self.launch, self.host, self.output_dir) if self.launch else []
        for rank in self.ranks:
            if rank.code is None and rank.ended():
                self._drain(rank)
        if self.records is not None:
            shutil.rmtree(self.records, ignore_errors=True)
        self.writer.send("bye", left=pids)
        self.writer.close()


def _create_record_folder() -> tuple[Path, IO[bytes]]:
    """Create a folder for records, in memory if possible: a full disk must not prevent a rank from reporting it. Also
    return its lock, which shows other agents that it is in use. Remove the folders of killed agents."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    _remove_stale(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    lock = (folder / f".{_OWNER}").open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(lock.name, folder / _OWNER)  # never visible without the lock
    return folder, lock


def _remove_stale(parent: Path) -> None:
    """Remove record folders of this user whose agent is gone. The lock ends with the process, whatever ended it; a
    process id would be unknown in another container that shares /dev/shm."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, of another agent that removes it, or not readable
            if folder.is_symlink() or folder.lstat().st_uid != os.getuid():
                continue
            if not (folder / _OWNER).exists():  # an agent that starts, or one that was killed as it started
                if time.time() - folder.stat().st_mtime > _START_S:
                    shutil.rmtree(folder)
                continue
            with (folder / _OWNER).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def main() -> None:
    """Serve the supervisor over standard input and output."""
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # other output must not mix with messages
    sys.stdout.flush()
    Agent(output).serve()


if __name__ == "__main__":
    main()
