"""Write a plan's files, run its commands, forward signals, and return their exit code."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

import psutil

from m3i_scale.errors import UserError
from m3i_scale.files import atomic_write
from m3i_scale.host.processes import SIGNALS, TIED, noted_signals
from m3i_scale.launch import Command, LaunchPlan

_GRACE_S = 60.0
"""Commands that still run this long after another one failed wait for missing ranks, and are ended."""
_POLL_S = 0.1
_RETRY_S = 2.0


def write_files(plan: LaunchPlan) -> None:
    """Write the files of a plan; each is created with its final mode."""
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        for file in plan.files:
            atomic_write(plan.folder / file.name, file.text, mode=file.mode)
    except OSError as error:
        raise UserError(
            f"cannot write the files of the launcher: {error.strerror}",
            where=str(error.filename),
            fix="set output_dir to a folder that this machine and all ranks can write to",
        ) from None


def check_needs(plan: LaunchPlan) -> None:
    """Raise UserError if a required program is missing or the port is in use."""
    for executable in plan.needs:
        if shutil.which(executable.name) is None:
            raise UserError(
                f"'{executable.name}' {'cannot be run' if '/' in executable.name else 'is not installed'} here",
                where=f"--with {plan.launcher}",
                fix=executable.package,
            )
    if not plan.workdir.is_dir():
        raise UserError(
            "the working directory does not exist", where=str(plan.workdir), fix="set --workdir to an existing folder"
        )
    if plan.port is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", plan.port))
            except OSError:
                raise UserError(
                    f"port {plan.port} of this machine is in use, perhaps by another run",
                    where="--master-port",
                    fix=f"use --master-port {plan.port + 1}",
                ) from None


@dataclass
class LaunchResult:
    """The result of a plan's commands."""

    code: int = 0
    """Shell exit code of the first failed command; 0 if none failed."""
    codes: list[int] = field(default_factory=list)
    """Exit codes of all commands, in order; negative: the signal that ended the command."""
    times: list[float] = field(default_factory=list)
    """End times, in Unix seconds."""
    forced: set[int] = field(default_factory=set)
    """Commands that were ended because another one had failed."""
    stop_requests: int = 0
    """Number of signals that requested a stop."""


def execute(plan: LaunchPlan, redacted: LaunchPlan, environment: Mapping[str, str]) -> LaunchResult:
    """Run the commands until all have ended, after `check_needs` and `write_files`. `redacted` is printed, except the
    commands of ranks, which are all alike (`launch --dry-run` prints them)."""
    lines = [f"+ {command}" for command in redacted.commands]
    for line in [f"starting {len(lines)} processes on this machine"] if plan.ranks else lines:
        print(line, file=sys.stderr, flush=True)
    return Running(plan, environment).wait()


class Running:
    """The running commands of a plan."""

    def __init__(self, plan: LaunchPlan, environment: Mapping[str, str]) -> None:
        self._plan = plan
        self._environment = environment
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended = LaunchResult()

    def wait(self) -> LaunchResult:
        """Start the commands, forward signals to them, and wait for them."""
        with noted_signals(self._note):
            try:
                # Separate sessions: a Ctrl-C at the terminal reaches them only through this process, once.
                for command in self._plan.commands:
                    self._processes.append(self._start(command))
                if self._ended.stop_requests and not self._plan.stops:  # a signal arrived during the start
                    self._forward(signal.SIGTERM)
                return self._until_all_have_ended()
            finally:
                _end(self._processes)

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        tie = {TIED: str(os.getpid())} if self._plan.tied else {}
        return subprocess.Popen(
            command.argv,
            cwd=self._plan.workdir,
            env={**self._environment, **command.environment, **tie},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _until_all_have_ended(self) -> LaunchResult:
        ended, ends_at = self._ended, float("inf")
        ended.times = [float("inf")] * len(self._processes)
        while self._poll():
            if ended.code and ends_at == float("inf"):
                ends_at = time.monotonic() + _GRACE_S
            if time.monotonic() > ends_at:
                ended.forced = {place for place, process in enumerate(self._processes) if process.poll() is None}
                _end(self._processes)
            time.sleep(_POLL_S)
        ended.codes = [process.returncode for process in self._processes]
        ended.code = 128 - ended.code if ended.code < 0 else ended.code
        if ended.stop_requests and 256 - ended.code in SIGNALS:  # DeepSpeed exits with a rank's negative signal number
            ended.code = 128 + (256 - ended.code)
        return ended

    def _poll(self) -> bool:
        """Record ended commands; return whether any still runs."""
        for place, process in enumerate(self._processes):
            if self._ended.times[place] == float("inf") and process.poll() is not None:
                self._ended.times[place] = time.time()
                self._ended.code = self._ended.code or process.returncode
        return float("inf") in self._ended.times

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._ended.stop_requests += 1
        if self._plan.stops and self._ended.stop_requests == 1:
            # Not in the handler, because ssh may be slow.
            threading.Thread(target=self._stop_ranks, daemon=True).start()
        else:
            self._forward(signal.SIGTERM if number == signal.SIGHUP else number)

    def _forward(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _stop_ranks(self) -> None:
        """Ask the ranks to stop until one of them has received the request: they may not have been started yet."""
        while self._ended.stop_requests == 1:
            commands = [self._start(command) for command in self._plan.stops]
            codes = [process.wait() for process in commands]
            if 0 in codes:
                return
            time.sleep(_RETRY_S)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask all processes together to end, then kill the remaining ones with everything that they started."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        with contextlib.suppress(ProcessLookupError):  # a signal handler has already polled its end
            os.killpg(process.pid, signal.SIGTERM)
    ends_at = time.monotonic() + _GRACE_S
    for process in running:
        try:
            process.wait(max(0.0, ends_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            below = _below(process.pid)  # torchrun starts every rank in a new session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for child in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
