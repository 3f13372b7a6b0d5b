"""`m3i-scale watch` in a real pseudo-terminal, over a run that grows."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from run_folder import write_run

from m3i_scale.report.run_files import read_run
from m3i_scale.report.watch import RunSnapshot, curve, render_lines

COMMAND = [sys.executable, "-m", "m3i_scale", "watch"]
LEFT = "\x1b[?1049l"
"""The sequence with which the screen of before comes back."""
WAIT_S = 300.0


def lines(folder: Path, after: int, to: int) -> str:
    """The lines of some steps."""
    every = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    return "".join(line for line in every if after < json.loads(line)["step"] <= to)


def frames(shown: str) -> list[str]:
    """All that was drawn from beginning to end, without colors."""
    title = "photos-vit-l"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "")
    return [title + frame for frame in plain.split(title)[1:-1]]


def width(frame: str) -> int:
    return max(map(len, frame.split("\n")))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "full")


@pytest.fixture
def growing(full: Path, tmp_path: Path) -> Path:
    """The first lines of a run that goes on."""
    (tmp_path / "run.yaml").write_text((full / "run.yaml").read_text())
    (tmp_path / "metrics.jsonl").write_text(lines(full, -1, 390))
    return tmp_path


class Terminal:
    """The screen of a watched run."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process, self.master, self.shown = process, master, ""
        self._raw = b""

    def until(self, told: Callable[[str], bool]) -> str:
        """Read on until what was shown since the last time is as told; return it."""
        deadline = time.monotonic() + WAIT_S
        while not told(self.shown):
            assert time.monotonic() < deadline, self.shown[-3000:]
            self._read()
        shown, self.shown = self.shown, ""
        return shown

    def shows(self, *words: str) -> str:
        return self.until(lambda shown: all(word in shown for word in words))

    def key(self, key: bytes) -> None:
        os.write(self.master, key)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def end(self) -> int:
        """Return the exit code; all that was written by then is in `shown`."""
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            self._read()
        while self._read(1_000):
            pass
        return self.process.returncode

    def _read(self, wait_ms: int = 50) -> bool:
        poll = select.poll()  # `select` ends at 1,024 open files
        poll.register(self.master, select.POLLIN)
        found = bool(poll.poll(wait_ms))
        if found:
            self.shown += os.read(self.master, 1 << 16).decode(errors="replace")
        return found


@contextmanager
def watched(folder: Path, every_s: float = 0.2, **environment: str) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    before = termios.tcgetattr(slave)
    variables = os.environ | {"TERM": "xterm-256color"} | environment
    for name in ("COLUMNS", "LINES"):
        variables.pop(name, None)
    process = subprocess.Popen(
        ["setsid", "--ctty", *COMMAND, str(folder), "--every", str(every_s)],  # or Ctrl-C would reach nobody
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=variables,
    )
    try:
        yield Terminal(process, master)
        assert process.poll() is not None
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def test_a_run_is_followed_while_it_grows_and_is_cut_back(growing: Path, full: Path) -> None:
    with watched(growing) as terminal:
        shown = terminal.shows("photos-vit-l", "step 390/2,000", " left", "time of a step", "text nats", "samples/s")
        assert "\x1b[1m" in shown  # bold
        with (growing / "metrics.jsonl").open("a") as stream:
            stream.write(lines(full, 390, 1250))
            stream.write(lines(full, 1250, 1260)[:100])  # half written
        terminal.shows("step 1,000: rolled back", "a group dominates the gradient", "1,250/2,000")
        again = growing / "again"
        again.write_text(lines(full, -1, 590))
        os.replace(again, growing / "metrics.jsonl")
        terminal.shows("590/2,000")
        terminal.resize(40, 24)  # a frame may just be drawn as wide as before
        terminal.until(lambda shown: any("590/2,000" in frame and width(frame) <= 40 for frame in frames(shown)))
        with (growing / "metrics.jsonl").open("a") as stream:
            stream.write(lines(full, 590, 2000))
        terminal.shows("finished", "2,000/2,000")
        time.sleep(0.5)
        assert terminal.process.poll() is None  # it stays until q
        terminal.key(b"q")
        assert terminal.end() == 0
        assert terminal.shown.endswith(("\x1b[?25h", LEFT))
        assert LEFT in terminal.shown


@pytest.mark.parametrize(
    ("leave", "code"),
    [
        (lambda terminal: terminal.key(b"\x03"), 0),
        (lambda terminal: terminal.process.send_signal(signal.SIGTERM), 128 + signal.SIGTERM),
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_the_terminal_is_as_before_however_it_ends(growing: Path, leave: Callable[[Terminal], None], code: int) -> None:
    with watched(growing, NO_COLOR="1") as terminal:
        assert re.search(r"\x1b\[[0-9;]*3[0-9]", terminal.shows("390/2,000")) is None  # no color
        leave(terminal)
        assert terminal.end() == code
        assert LEFT in terminal.shown
        assert "\x1b[?25h" in terminal.shown


def test_another_size_of_the_terminal_does_not_wait_for_the_next_look(growing: Path) -> None:
    with watched(growing, every_s=1000.0) as terminal:
        terminal.shows("390/2,000")
        terminal.resize(60, 12)
        terminal.shows("390/2,000", "q: end")
        terminal.key(b"q")
        assert terminal.end() == 0


def test_a_run_file_that_breaks_meanwhile_is_named(growing: Path) -> None:
    with watched(growing) as terminal:
        terminal.shows("390/2,000")
        (growing / "run.yaml").write_text("a: [")
        terminal.shows("run.yaml: ")
        terminal.key(b"q")
        assert terminal.end() == 0


def test_elsewhere_than_on_a_terminal_it_is_plain_text(full: Path, tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, str(full)], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert "\x1b" not in done.stdout
    for words in ("step 2,000/2,000", "finished", "text nats", "MFU", "quarantined", "lost node1"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    refused = subprocess.run([*COMMAND, str(tmp_path)], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert str(tmp_path) in refused.stderr


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 60), (5, 3), (20, 10), (40, 24), (80, 24), (250, 70)])
def test_nothing_leaves_the_terminal(full: Path, width: int, height: int) -> None:
    shown = render_lines(_moment(full), width, height)
    assert len(shown) <= height
    assert max(line.cell_len for line in shown) <= width


def test_figures_beyond_all_measure_are_drawn(full: Path, growing: Path) -> None:
    record = json.loads(lines(full, 0, 10).splitlines()[0])
    with (growing / "metrics.jsonl").open("a") as stream:
        for step, figure in enumerate((1.7e308, -1.7e308, 1.7e308), 391):
            figures = {name: figure for name, value in record.items() if type(value) is float}
            stream.write(json.dumps(record | figures | {"step": step}) + "\n")
    shown = render_lines(_moment(growing), 100, 60)
    assert max(line.cell_len for line in shown) <= 100


def test_what_files_say_cannot_command_the_terminal(growing: Path) -> None:
    words = {"what": "\x1b]0;title\x07\x1b[2J", "why": "\x9b2J\ud800", "fix": "", "group": "日本語"}
    line = {"kind": "warning", "step": 390, "time": "2030-01-01T13:00:00+00:00", **words}
    with (growing / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    shown = [line.plain for line in render_lines(_moment(growing), 40, 60)]
    assert any("日本語" in text for text in shown)
    assert all(text.isprintable() for text in shown)


def _moment(folder: Path) -> RunSnapshot:
    return RunSnapshot(read_run(folder), None, [], [], {}, None)


def test_a_low_chart_names_its_lowest_and_highest_value() -> None:
    drawn = curve(np.arange(1, 101), np.linspace(0.002, 0.01, 100), 40, 5, "{:.1%}")
    labels = [line.split("┤")[0].strip() for line in drawn if "┤" in line]
    assert labels == ["1.0%", "0.2%"]
