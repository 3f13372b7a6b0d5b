"""Thin curves, so that a page or a terminal draws few points and still shows every spike."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tsdownsample import MinMaxLTTBDownsampler


def downsample(x: NDArray[Any], y: NDArray[Any], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return at most `count` points of a curve, chosen by MinMaxLTTB: the extremes of every stretch are candidates, of
    which largest-triangle-three-buckets takes those that change the drawn line most. No value is averaged or moved.

    Points whose y is not finite are left out: no line can be drawn to them.

    Source: Van Der Donckt et al., MinMaxLTTB: Leveraging MinMax-Preselection to Scale LTTB, 2023 (arXiv:2305.00332).

    Args:
        x: of shape N, increasing.
        y: of shape N.
        count: at least 3.
    """
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) <= count:
        return x, y
    chosen = MinMaxLTTBDownsampler().downsample(np.ascontiguousarray(x), np.ascontiguousarray(y), n_out=count)
    return x[chosen], y[chosen]
