"""Processes of a launch on one host: found by a mark in their environment, independent of their parents; tied to their
parent; stopped by signals."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

MARK = "M3I_SCALE_LAUNCH"
"""Environment variable of every rank and its children: launch, host, output folder (`process_tag`)."""
TIED = "M3I_SCALE_TIED"
"""Environment variable of ranks, and of their launchers on other hosts: they end with their parent, even if it is
killed. Its value is the parent's pid, or PARENT for any parent."""
PARENT = "parent"

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
_END_S = 10.0


def signals_to_note() -> list[signal.Signals]:
    """Return the signals that ask a launch to stop, including a lost terminal (SIGHUP), but not under nohup."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [*SIGNALS, *hung_up]


@contextlib.contextmanager
def noted_signals(note: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle stop signals with `note` inside the context."""
    before = {number: signal.signal(number, note) for number in signals_to_note()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def process_tag(launch: str, host: str, output_dir: str) -> str:
    """Return the value of MARK. It includes the host, because hosts may share a process table (containers,
    namespaces)."""
    return f"{launch}|{host}|{output_dir}"


@dataclass(frozen=True)
class TaggedProcess:
    """A process that a launch has left on this host."""

    pid: int
    launch: str
    command: str


def marked(host: str, output_dir: str) -> list[TaggedProcess]:
    """Return the live processes of any launch of that run, as `host`; processes of other users cannot be read."""
    processes = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # owned by another user, or already ended
            continue
        start = f"{MARK}=".encode()
        for variable in environment.split(b"\0"):
            if variable.startswith(start):
                launch, _, rest = variable[len(start) :].decode(errors="replace").partition("|")
                if rest == f"{host}|{output_dir}" and command:  # without a command line: a zombie
                    processes.append(TaggedProcess(int(folder.name), launch, command))
    return sorted(processes, key=lambda process: process.pid)


def end_marked(launch: str, host: str, output_dir: str) -> list[int]:
    """Kill the remaining processes of a launch on this host; return the pids that could not be killed (in a system call
    that does not return)."""
    pids: list[int] = []
    empty_scans = 0
    deadline = time.monotonic() + _END_S
    while empty_scans < 2 and time.monotonic() < deadline:  # a process shows no environment during exec
        pids = [process.pid for process in marked(host, output_dir) if process.launch == launch]
        empty_scans = 0 if pids else empty_scans + 1
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return pids


def oom_kills() -> int | None:
    """Return the number of out-of-memory kills by this host's kernel so far; None if not available."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent ends, also after `exec`. Raise OSError if that fails (not on
    Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def end_with_parent() -> None:
    """End with the parent if it requested that (TIED), or immediately if it has already ended."""
    parent = os.environ.get(TIED)
    if not parent:
        return
    die_with_parent()
    if parent != PARENT and os.getppid() != int(parent):
        os._exit(1)


def main() -> None:
    """Run `python -m m3i_scale.host.processes PARENT COMMAND…`: become the command, and end with PARENT."""
    die_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it ended before the call above
        sys.exit(1)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
