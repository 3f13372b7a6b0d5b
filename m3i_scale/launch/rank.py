"""Run one rank under an agent: its process, its last log lines, and its failure reason."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from m3i_scale.errors import EXIT_PREEMPTED
from m3i_scale.launch.failures import LAST_LINES, Failure, read_record, record_file
from m3i_scale.launch.heartbeat import RankState, heartbeat_file, read_heartbeat
from m3i_scale.launch.processes import oom_kills

_LINE_BYTES = 2000


class Rank:
    """The process of one rank.

    Args:
        number: its RANK.
        command: command of every rank.
        environment: the complete environment.
        cwd: working directory of the process.
        records: the folder for its heartbeat and its error file.
    """

    def __init__(
        self, number: int, command: Sequence[str], environment: Mapping[str, str], cwd: str, records: Path
    ) -> None:
        self.number = number
        self.code: int | None = None
        self._records = records
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._part = ""
        self._ooms = oom_kills()
        tied = [sys.executable, "-m", "m3i_scale.launch.processes", str(os.getpid()), *command]
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
        """Keep the last lines; for a line that is overwritten repeatedly (a progress bar), its last text."""
        *whole, self._part = (self._part + data.decode(errors="replace")).split("\n")
        shown = [line.rstrip("\r").rpartition("\r")[2][:_LINE_BYTES] for line in whole]
        self._lines.extend(line for line in shown if line.strip())
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
        """Kill the rank and its process group, unless the rank has ended: its pid may belong to another group by then.
        Its remaining processes are found by their mark."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def seen(self) -> RankState | None:
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
        seen = self.seen() or RankState(-1, -1, "start", 0.0, 0.0, {})
        kind, message = self._told_by_code(lines)
        return asdict(
            Failure(
                time=time.time(),
                host=host,
                rank=self.number,
                step=seen.step,
                phase=seen.phase,
                kind="signal" if kind else "exit",
                message=message,
                exit_code=self.code,
                lines=lines,
            )
        )

    def _told_by_code(self, lines: Sequence[str]) -> tuple[bool, str]:
        """Return whether a signal ended the rank, and the message about its end."""
        code = self.code or 0
        if code >= 0:
            error_line = next((line.strip() for line in reversed(lines) if "error" in line.lower()), "")
            return False, f"the rank ended with exit code {code}" + (f": {error_line}" if error_line else "")
        name = signal.Signals(-code).name
        message = f"the rank was ended by signal {-code} ({name})"
        return True, message + (self._about_memory() if -code == signal.SIGKILL else "")

    def _about_memory(self) -> str:
        now = oom_kills()
        if now is None or self._ooms is None:
            return ": likely the kernel's, out of memory (this host does not say)"
        if now > self._ooms:
            return f": out of memory (the kernel of this host has killed {now - self._ooms} for it meanwhile)"
        return ": out of memory is the usual reason, but the kernel of this host counts no such kill (/proc/vmstat)"
