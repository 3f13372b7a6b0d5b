"""Text chart of one curve."""

from __future__ import annotations

from typing import Any

import plotext
from numpy.typing import NDArray

from m3i_scale.report.downsample import downsample

_LARGEST = 1e300
"""For larger values, differences computed by plotext would overflow."""


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
