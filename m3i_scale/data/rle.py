"""Read and write the run lengths of masks as COCO packs them into text, without a library: text may be hostile.

A mask is written column by column, as the lengths of runs of 0 and 1 in turn, the first of 0. From the fourth on, a
length is its difference from the one before the last. A number is groups of five bits, the lowest first, each a
character from `0` on: 32 says that another group follows, and 16 in the last group that the number is negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError("the text of the mask has other letters") from None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("the text of the mask is none of run lengths")
    lasts = np.flatnonzero((codes & 32) == 0)
    firsts = np.concatenate(([0], lasts[:-1] + 1))
    groups = lasts - firsts + 1
    if groups.max() > _GROUPS:
        raise ValueError("a length of the mask is too large")
    place = np.arange(len(codes)) - np.repeat(firsts, groups)
    runs = np.add.reduceat((codes & 31) << 5 * place, firsts)
    runs -= np.where(codes[lasts] & 16, 1 << 5 * groups, 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise ValueError(f"the runs of the mask do not fill its {pixels} pixels")
    return runs
