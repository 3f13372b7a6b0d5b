"""`m3i-scale watch`: read-only terminal dashboard of a run during training, from its files."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, ConsoleDimensions, Group
from rich.text import Text

from m3i_scale.errors import CheckpointError
from m3i_scale.host.failures import read_attempts, read_failure
from m3i_scale.host.output_dir import QUARANTINE, holder_of
from m3i_scale.report.run_files import Quarantined, RunReader, quarantine_of, ranks_of
from m3i_scale.report.watch_view import RunSnapshot, is_shown, render_lines

_LOOK_S = 0.2
"""Interval for detecting a resized terminal."""
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PLAIN_COLUMNS = 80


def watch(folder: Path, every_s: float) -> None:
    """Show a run until `q` or Ctrl-C, polling its files. Without a terminal, print it once as plain text."""
    files = _Files(folder)
    console = Console()
    if not (sys.stdin.isatty() and console.is_terminal) or console.is_dumb_terminal:
        width = console.width if "COLUMNS" in os.environ else _PLAIN_COLUMNS
        for line in render_lines(files.poll(), width, None):
            print(line.plain.rstrip())
        return
    with _keys() as is_ended, console.screen() as screen:
        while True:
            watched, until_s = files.poll(), time.monotonic() + every_s
            drawn: ConsoleDimensions | None = None
            while time.monotonic() < until_s:
                if console.size != drawn:
                    drawn = console.size
                    lines = render_lines(watched, drawn.width, drawn.height - 1)
                    screen.update(Group(*lines, Text("q: end", "dim")))
                if is_ended():
                    return


class _Files:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = RunReader(folder, is_shown)
        self._quarantine: dict[str, Quarantined] = {}
        self._quarantine_bytes = 0

    def poll(self) -> RunSnapshot:
        folder, file = self._folder, self._folder / QUARANTINE
        size = file.stat().st_size if file.is_file() else 0
        if size != self._quarantine_bytes:
            self._quarantine, self._quarantine_bytes = quarantine_of(folder), size
        return RunSnapshot(
            run=self._reader.read(),
            holder=_holder(folder),
            ranks=ranks_of(folder),
            attempts=read_attempts(folder),
            quarantine=self._quarantine,
            failure=read_failure(folder),
        )


def _holder(folder: Path) -> str | None:
    try:
        holder = holder_of(folder)
    except CheckpointError as error:  # it is just starting, or the lock cannot be read
        return error.what
    return None if holder is None else str(holder)


@contextmanager
def _keys() -> Iterator[Callable[[], bool]]:
    """Yield a function that waits briefly for typed keys and returns whether to end: for `q`, Ctrl-C or end of input.
    The state of standard input is always restored."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    # A flag instead of an exception, which would be lost inside a finalizer or callback.
    interrupted = threading.Event()
    handlers = {number: signal.signal(number, _end) for number in _ENDING}
    handlers[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        tty.setcbreak(keyboard)
        yield lambda: _is_ended(keyboard) or interrupted.is_set()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _is_ended(keyboard: int) -> bool:
    """Wait briefly for keys; return whether one of them is `q`, or input has ended."""
    ready, _, _ = select.select([keyboard], [], [], _LOOK_S)
    if not ready:
        return False
    keys = os.read(keyboard, 1024)
    return b"q" in keys or not keys
