"""Processes of a launch on one host: found by a mark in their environment, whatever became of their parents."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

MARK = "M3I_SCALE_LAUNCH"
"""Environment variable of every rank and of what it starts: launch, host and output folder, as `mark_of` joins them."""
TIED = "M3I_SCALE_TIED"
"""Environment variable of ranks, and of their launchers on other hosts: they end with their parent, however it ends.
Its value is the parent's number, or PARENT."""
PARENT = "parent"
"""Whichever it is."""

_PR_SET_PDEATHSIG = 1
_END_S = 10.0


def mark_of(launch: str, host: str, output_dir: str) -> str:
    """The value of MARK. Hosts may share a process table (containers, namespaces), so each has its own."""
    return f"{launch}|{host}|{output_dir}"


@dataclass(frozen=True)
class Marked:
    """A process that a launch has left on this host."""

    pid: int
    launch: str
    command: str


def marked(host: str, output_dir: str) -> list[Marked]:
    """Live processes of any launch of that run, as `host`; those of other users cannot be read and are left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # another user's, or gone meanwhile
            continue
        start = f"{MARK}=".encode()
        for variable in environment.split(b"\0"):
            if variable.startswith(start):
                launch, _, rest = variable[len(start) :].decode(errors="replace").partition("|")
                if rest == f"{host}|{output_dir}" and command:  # without a command line: a zombie
                    found.append(Marked(int(folder.name), launch, command))
    return sorted(found, key=lambda process: process.pid)


def end_marked(launch: str, host: str, output_dir: str) -> list[int]:
    """Kill what is left of a launch on this host.

    Returns:
        The pids of those that are there all the same (in a system call that does not return).
    """
    deadline = time.monotonic() + _END_S
    while True:
        left = [process.pid for process in marked(host, output_dir) if process.launch == launch]
        if not left or time.monotonic() > deadline:
            return left
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def oom_kills() -> int | None:
    """Processes that the kernel of this host has killed for want of memory since it was started; None: it does not
    say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def die_with_parent() -> None:
    """From here on the kernel kills this process when its parent ends. Survives `exec`.

    Raises:
        OSError: the kernel refuses (Linux does not).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def obey_tie() -> None:
    """End with the parent, where it has asked for that; at once where it has ended already.

    Raises:
        OSError: as `die_with_parent`.
    """
    parent = os.environ.get(TIED)
    if not parent:
        return
    die_with_parent()
    if parent != PARENT and os.getppid() != int(parent):
        os._exit(1)


def main() -> None:
    """`python -m m3i_scale.launch.processes PARENT COMMAND…`: become the command, and end with PARENT."""
    die_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it ended before the kernel was told
        sys.exit(1)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
