"""`m3i-scale watch`: read-only terminal dashboard of a run during training, from its files, for terminals of any size:
progress, curves, step timings, hosts, problems."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import sys
import termios
import textwrap
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import plotext
from numpy.typing import NDArray
from rich.cells import set_cell_size
from rich.console import Console, ConsoleDimensions, Group
from rich.text import Text

from m3i_scale.errors import CheckpointError
from m3i_scale.host.failures import AttemptRecord, Failure, read_attempts, read_failure
from m3i_scale.host.output_dir import QUARANTINE, holder_of
from m3i_scale.report.about import marks_of
from m3i_scale.report.charts import downsample
from m3i_scale.report.metrics_file import unix_s
from m3i_scale.report.run_files import Quarantined, RankSign, RunFiles, RunReader, quarantine_of, ranks_of
from m3i_scale.text import duration_text, filled, listed, printable

_LOOK_S = 0.2
"""Interval for detecting a resized terminal."""
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PLAIN_COLUMNS = 80
_LEAST_COLUMNS, _LEAST_LINES, _MOST_LINES = 36, 6, 12
"""Size of a chart, including its title."""
_EVENTS = 4
_PROBLEMS = ("warning", "rewound", "lost")
"""Kinds of events to list."""
_FIGURES = {
    "loss": ("loss", "{:.4g}"),
    "throughput/samples_per_s": ("samples/s", "{:,.1f}"),
    "perf/mfu": ("MFU", "{:.1%}"),
    "time/data_wait_share": ("data wait", "{:.0%}"),
    "lr": ("lr", "{:.2e}"),
    "memory_gib": ("memory", "{:.2f} GiB"),
}
_WITHOUT_CURVE = ("lr", "memory_gib")
_LARGEST = 1e300
"""For larger values, differences computed by plotext would overflow."""


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

    def is_ended() -> bool:
        ready, _, _ = select.select([keyboard], [], [], _LOOK_S)
        keys = os.read(keyboard, 1024) if ready else None
        return interrupted.is_set() or (keys is not None and (b"q" in keys or not keys))

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    # A flag instead of an exception, which would be lost inside a finalizer or callback.
    interrupted = threading.Event()
    handlers = {number: signal.signal(number, _end) for number in _ENDING}
    handlers[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        tty.setcbreak(keyboard)
        yield is_ended
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def is_shown(figure: str) -> bool:
    """Return whether the dashboard uses a metric of metrics.jsonl."""
    return figure in _FIGURES or figure.startswith(("loss/", "mi/", "time/"))


@dataclass(frozen=True)
class RunSnapshot:
    """State of a run at one moment."""

    run: RunFiles
    holder: str | None
    """Process that writes into the folder, in words; None if there is none."""
    ranks: Sequence[RankSign]
    attempts: Sequence[AttemptRecord]
    quarantine: dict[str, Quarantined]
    failure: Failure | None


def render_lines(watched: RunSnapshot, width: int, height: int | None) -> list[Text]:
    """Return the lines of the dashboard, none longer than `width` letters. Charts use the rest of `height` (None: no
    limit)."""
    head, foot = [*_head(watched, width)], [*_foot(watched, width)]
    room = None if height is None else height - len(head) - len(foot)
    lines = [*head, *_charts(watched.run, width, room), *foot][:height]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _head(watched: RunSnapshot, width: int) -> Iterator[Text]:
    run = watched.run
    yield Text(printable(f"{run.name}  {run.folder}"), "bold")
    share = 0.0
    words = f"step {run.step:,}"
    if run.total_steps:
        share = run.step / run.total_steps
        words = f"step {run.step:,}/{run.total_steps:,}  {share:.1%}"
    if run.left_s is not None:
        words += f"  {duration_text(run.left_s)} left"
    yield Text(words)
    yield Text(_bar(share, width), "green")
    yield from _wrapped(_state(watched), width, "")
    figures = [f"{name} {value:.1%}" for name, value in run.scores.items()]
    figures += [f"{words} {value}" for _, words, value in _latest(run)]
    yield from (Text(line) for line in filled(figures, width))


def _state(watched: RunSnapshot) -> str:
    run = watched.run
    heard = [*run.times_s[-1:], *(unix_s(line) for line in (*run.starts[-1:], *run.ends[-1:]))]
    ago = f", last line {duration_text(max(0.0, time.time() - max(heard)))} ago" if heard else ""
    failure = f": {watched.failure.message.splitlines()[0]}" if watched.failure and watched.failure.message else ""
    if run.status is not None:
        return f"{run.status}{failure if run.status == 'failed' else ''}"
    if watched.holder is not None:
        return f"running, {watched.holder}{ago}"
    if not run.starts:
        return "not running, no step so far"
    return f"not running any more{failure or ', no exit status recorded'}{ago}"


def _latest(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    """Yield (name, words, value) of the newest metrics."""
    for name, (words, form) in _FIGURES.items():
        if name in run.figures:
            yield name, words, form.format(run.figures[name][-1])
        if name == "loss":
            yield from _groups(run)


def _groups(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    """Yield the nats of every group, or its loss if nats are not computed."""
    for group in [name.removeprefix("loss/") for name in run.figures if name.startswith("loss/")]:
        if f"loss/{group.rpartition('/')[0]}" in run.figures:
            continue  # a term of a loss
        for name, unit in ((f"mi/{group}", "nats"), (f"loss/{group}", "loss")):
            known = run.figures.get(name, np.empty(0))
            known = known[np.isfinite(known)]
            if len(known):
                yield name, printable(f"{group} {unit}"), f"{known[-1]:.4g}"
                break


def _charts(run: RunFiles, width: int, room: int | None) -> list[Text]:
    """Return rows of charts, most important first, within the available height."""
    columns = max(1, width // _LEAST_COLUMNS)
    chart_width = max(1, width // columns - 1)
    shown = [chart for chart in _latest(run) if chart[0] not in _WITHOUT_CURVE]
    count = len(shown) + 1  # the chart of step timings
    rows = math.ceil(count / columns)
    height = _MOST_LINES
    if room is not None:
        rows = min(rows, max(0, room) // _LEAST_LINES)
        height = min(_MOST_LINES, room // rows) if rows else 0
    if not len(run.steps) or not rows:
        return []
    charts = [_chart(run, *chart, chart_width, height) for chart in shown[: rows * columns]]
    charts.insert(1, _step_times(run, chart_width, height))
    lines = []
    for begin in range(0, rows * columns, columns):
        row = charts[begin : begin + columns]
        lines += [Text(" ").join(parts) for parts in zip(*row, strict=True)]
    return lines


def _chart(run: RunFiles, name: str, words: str, value: str, width: int, height: int) -> list[Text]:
    drawn = curve(run.steps, run.figures[name], width, height - 1, _FIGURES.get(name, ("", "{:.4g}"))[1])
    return [Text(set_cell_size(f"{words} {value}", width), "bold"), *(Text(line, "cyan") for line in drawn)]


def _step_times(run: RunFiles, width: int, height: int) -> list[Text]:
    pattern = re.compile("time/(?!step|data_wait)(.+)")
    seconds = {
        match[1]: float(values[-1]) for name, values in run.figures.items() if (match := pattern.fullmatch(name))
    }
    total = sum(seconds.values()) or 1.0
    largest = sorted(seconds, key=lambda name: -seconds[name])[: height - 1]
    lines = [Text(set_cell_size("time of a step", width), "bold")]
    for name, share in ((name, seconds[name] / total) for name in seconds if name in largest):
        bar = _bar(share, max(0, width - 16))
        lines.append(Text(set_cell_size(f"{printable(name)[:9]:9} {share:5.0%} {bar}", width), "magenta"))
    return [*lines, *(Text(" " * width) for _ in range(height - len(lines)))]


def _foot(watched: RunSnapshot, width: int) -> Iterator[Text]:
    for host, of_host in groupby(watched.ranks, key=lambda sign: sign.host):
        signs = [*of_host]
        ago = duration_text(max(0.0, time.time() - max(sign.heard_s for sign in signs)))
        ranks = _ranges([sign.rank for sign in signs])
        yield from _wrapped(f"host {host}: ranks {ranks}, last seen {ago} ago", width, "")
    if watched.quarantine:
        reasons = [f"{reason} {of_reason.count:,}" for reason, of_reason in watched.quarantine.items()]
        yield from _wrapped(f"quarantined: {listed(reasons, 5)}", width, "yellow")
    if watched.run.settings_error is not None:
        yield from _wrapped(f"run.yaml: {watched.run.settings_error}", width, "yellow")
    if watched.run.unreadable:
        yield from _wrapped(f"{watched.run.unreadable:,} lines of metrics.jsonl cannot be read", width, "yellow")
    problems = [mark for mark in marks_of(watched.run, watched.attempts, None) if mark["kind"] in _PROBLEMS]
    for mark in problems[-_EVENTS:]:
        yield from _wrapped(f"step {mark['step']:,}: {mark['text']}", width, "yellow")


def _ranges(numbers: Sequence[int]) -> str:
    """Return `0–3, 6` for 0, 1, 2, 3, 6."""
    runs = [
        [number for _, number in pairs]
        for _, pairs in groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _wrapped(text: str, width: int, style: str) -> Iterator[Text]:
    lines = textwrap.wrap(printable(text), max(width, 10), max_lines=3, placeholder=" …")
    yield from (Text(line, style) for line in lines)


def _bar(share: float, width: int) -> str:
    done = round(min(1.0, max(0.0, share)) * width) if math.isfinite(share) else 0
    return "━" * done + "─" * (width - done)


def curve(x: NDArray[Any], y: NDArray[Any], width: int, height: int, form: str = "{:.4g}") -> list[str]:
    """Return the lines of a chart, each of `width` letters. x (increasing) and y have shape N; non-finite y are
    dropped. `form` is the format of the minimum and maximum labels."""
    x, y = downsample(x, y, 4 * width)  # a braille letter is two dots wide; a spike needs its highest and lowest point
    y = y.clip(-_LARGEST, _LARGEST)
    figure = plotext.figure
    plotext.terminal.limit(False, False)
    figure.clear()
    figure.plot_size(width, height)
    figure.axes(False, axis="x", side="upper")
    figure.axes(False, axis="y", side="right")
    if len(x):
        ends = sorted({int(x[0]), int(x[-1])})
        figure.ruler("x", "lower").ticks(ends, [f"{step:,}" for step in ends])
        extremes = sorted({float(y.min()), float(y.max())})
        figure.ruler("y", "left").ticks(extremes, [form.format(value) for value in extremes])
        figure.draw(figure.signal(x.tolist(), y.tolist(), marker="braille").lines(True))
    return [line.ljust(width)[:width] for line in figure.build().string(colorless=True).split("\n")[:height]]
