"""Downsampling of curves, so that a page or terminal draws few points but shows every spike."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tsdownsample import MinMaxLTTBDownsampler


def downsample(x: NDArray[Any], y: NDArray[Any], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Downsample a curve (x and y of shape N, x increasing) to at most `count` ≥ 3 points with MinMaxLTTB.

    The extremes of every interval are candidates. Largest-triangle-three-buckets selects those that change the line
    most. Values are never averaged or moved. Points with non-finite y are dropped, because a line cannot show them.

    Source: Van Der Donckt et al., MinMaxLTTB: Leveraging MinMax-Preselection to Scale LTTB, 2023 (arXiv:2305.00332).
    """
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) <= count:
        return x, y
    chosen = MinMaxLTTBDownsampler().downsample(np.ascontiguousarray(x), np.ascontiguousarray(y), n_out=count)
    return x[chosen], y[chosen]
