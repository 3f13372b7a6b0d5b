"""One probe on one host: how it is started, asked and ended. Nothing of it stays behind, here or there."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from m3i_scale.launch.doctor.probe import MARK
from m3i_scale.launch.environment import Variable

MODULE = "m3i_scale.launch.doctor.probe"
_REACHED = '{"doctor": {"reached": true}}'
_SSH_FAILED = 255
_END_S = 3.0
_TOLD_CHARACTERS = 300


class ProbeError(Exception):
    """A host that does not answer, or not as it should."""

    def __init__(self, what: str, *, reached: bool, code: int | None = None) -> None:
        self.what, self.reached, self.code = what, reached, code
        """`reached`: a shell on the host has begun; `code`: the exit code, where the process has ended."""
        super().__init__(what)


@dataclass(frozen=True)
class Way:
    """How hosts are reached, and what is started there."""

    python: str
    workdir: str
    variables: tuple[Variable, ...]
    ssh: Sequence[str] = ()
    """Further arguments of ssh."""
    connect_s: float = 10.0
    deadline_s: float = 600.0
    """After so long a probe ends by itself, whatever it is doing."""
    local: bool = False
    """No ssh: this machine."""

    def command(self, host: str) -> list[str]:
        """The one command for a host."""
        probe = [self.python, "-u", "-m", MODULE, f"{self.deadline_s:g}"]
        if self.local:
            return probe
        seconds = max(1, round(self.connect_s))
        options = ["BatchMode=yes", f"ConnectTimeout={seconds}", "ServerAliveInterval=5", "ServerAliveCountMax=3"]
        flags = [word for option in options for word in ("-o", option)]
        return ["ssh", "-T", *flags, *self.ssh, "--", host, self._script(probe)]

    def _script(self, probe: list[str]) -> str:
        """What the login shell of the host is given; values are quoted, so none of them can become code."""
        exports = [f"export {item.name}={shlex.quote(item.value)}" for item in self.variables if not item.secret]
        lines = [f"echo {shlex.quote(_REACHED)}", *exports]
        return "; ".join([*lines, f"cd {shlex.quote(self.workdir)} && exec {shlex.join(probe)}"])

    def environment(self) -> dict[str, str] | None:
        """Of the command; None for this process's own."""
        if not self.local:
            return None
        return {**os.environ, **{item.name: item.value for item in self.variables}}


class Channel:
    """A started probe. `ask` sends a request and waits for the answer; `end` leaves nothing behind."""

    def __init__(self, host: str, way: Way) -> None:
        """Starts; whether it has come up, `greet` tells."""
        self.host = host
        self._way = way
        self._reached = way.local
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  a pipe that nobody reads would fill and stop the probe
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            way.command(host),
            env=way.environment(),
            cwd=way.workdir if way.local else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # a Ctrl-C reaches it through `end` alone
        )
        threading.Thread(target=self._read, daemon=True).start()

    def greet(self, seconds: float) -> float:
        """Wait until the probe is there; returns after how many seconds the host was reached.

        Raises:
            ProbeError: see there.
        """
        until = time.monotonic() + seconds
        reached = 0.0
        while True:
            answer = self._next(until)
            if "reached" in answer:
                self._reached, reached = True, time.monotonic() - self.began
            else:
                break
        secret = {item.name: item.value for item in self._way.variables if item.secret and not self._way.local}
        if secret:
            self.ask(max(1.0, until - time.monotonic()), do="environment", secret=secret)
        return reached

    def ask(self, within_s: float, **request: Any) -> dict[str, Any]:
        """Send a request, and wait for its answer.

        Raises:
            ProbeError: none in time, or the probe has failed.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended; why, `_next` tells
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._next(time.monotonic() + within_s)
        if "error" in answer:
            raise ProbeError(str(answer["error"]), reached=True)
        return answer

    def end(self) -> None:
        """Let the probe end, and see to it that it does."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # what was not sent yet is of no use any more
                self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._lines.put(line)
        self._lines.put(None)

    def _next(self, until: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            waited = time.monotonic() - self.began
            raise ProbeError(f"no answer after {waited:.0f} s", reached=self._reached) from None
        if line is None:
            self._lines.put(None)
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)["doctor"]
        return answer

    def _ended(self) -> ProbeError:
        try:
            code: int | None = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:  # it has closed its output and is still there
            code = None
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
        what = said[-1][-_TOLD_CHARACTERS:] if said else f"it has ended with exit code {code}"
        return ProbeError(what, reached=self._reached or code != _SSH_FAILED, code=code)


def this_python() -> str:
    """The interpreter that asks, which hosts are expected to have too."""
    return sys.executable
