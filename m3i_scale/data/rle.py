"""Read and write the run lengths of masks as COCO packs them into text, without a library: text may be hostile.

A mask is written column by column, as the lengths of runs of 0 and 1 in turn, the first of 0. From the fourth on, a
length is its difference from the one before the last. A number is groups of five bits, the lowest first, each a
character from `0` on: 32 says that another group follows, and 16 in the last group that the number is negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LETTERS = 2
"""Letters for each pixel at most: a run has no more groups than pixels, and a difference no more than its two runs."""
_GROUPS = 7
"""No number has more: 2³⁴ is more pixels than any image has."""


def packed(runs: Sequence[int]) -> str:
    """Return run lengths as text.

    Args:
        runs: each from 0 to 2³³.

    Raises:
        ValueError: they are not.
    """
    if not all(type(run) is int and 0 <= run < 2**33 for run in runs):
        raise ValueError("a length of the mask is no whole number from 0 on")
    letters = bytearray()
    for place, run in enumerate(runs):
        number = run - runs[place - 2] if place > 2 else run
        while True:
            group, number = number & 31, number >> 5
            last = number == (-1 if group & 16 else 0)
            letters.append(48 + group + (0 if last else 32))
            if last:
                break
    return letters.decode("ascii")


def unpacked(text: str, pixels: int) -> NDArray[np.int64]:
    """Return the run lengths in a text.

    Args:
        text: as `packed` returns it.
        pixels: of the mask, which they have to fill.

    Raises:
        ValueError: it is no such text, or of another number of pixels.
    """
    if len(text) > _LETTERS * (pixels + 2):
        raise ValueError(f"the text of the mask is too long for its {pixels} pixels")
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    except UnicodeEncodeError:
        raise ValueError("the text of the mask has other letters") from None
    if not len(codes) or codes.min() < 48 or codes.max() > 48 + 63 or (codes[-1] - 48) & 32:
        raise ValueError("the text of the mask is none of run lengths")
    codes = codes - np.uint8(48)
    lasts = np.flatnonzero((codes & 32) == 0).astype(np.int32)  # of up to 2²⁹ letters, see MAX_SAMPLE_BYTES
    groups = np.diff(lasts, prepend=np.int32(-1))
    if groups.max() > _GROUPS:
        raise ValueError("a length of the mask is too large")
    runs = (codes[lasts - groups + 1] & 31).astype(np.int64)
    for group in range(1, int(groups.max())):
        longer = np.flatnonzero(groups > group)
        at = lasts[longer] - groups[longer] + 1 + group
        runs[longer] += (codes[at] & 31).astype(np.int64) << 5 * group
    below_zero = np.flatnonzero(codes[lasts] & 16)
    runs[below_zero] -= 1 << 5 * groups[below_zero].astype(np.int64)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise ValueError(f"the runs of the mask do not fill its {pixels} pixels")
    return runs
