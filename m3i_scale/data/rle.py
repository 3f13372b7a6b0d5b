"""COCO's compressed run-length encoding of masks, implemented without a library because the text may be malicious.

A mask is a sequence of alternating run lengths of 0 and 1 in column-major order, starting with 0. From the fourth on, a
run length is stored as the difference from the run two positions before. A number is a sequence of 5-bit groups, lowest
first, each a character from `0` on. Bit 32 marks that another group follows; bit 16 of the last group marks the sign.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LETTERS = 2
"""Maximum characters per pixel: a run has at most as many groups as pixels, a difference as many as its two runs."""
_GROUPS = 7
"""Maximum number of groups: 2³⁴ exceeds the number of pixels of any image."""


def packed(runs: Sequence[int]) -> str:
    """Encode run lengths, integers from 0 to 2³³ - 1, as text. Other values raise a ValueError."""
    if not all(type(run) is int and 0 <= run < 2**33 for run in runs):
        raise ValueError("a run length of the mask is not a non-negative integer")
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
    """Decode run lengths from text. Raise a ValueError if the text is invalid or the runs do not fill `pixels`."""
    if len(text) > _LETTERS * (pixels + 2):
        raise ValueError(f"the text of the mask is too long for its {pixels} pixels")
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    except UnicodeEncodeError:
        raise ValueError("the text of the mask has invalid characters") from None
    if not len(codes) or codes.min() < 48 or codes.max() > 48 + 63 or (codes[-1] - 48) & 32:
        raise ValueError("the text of the mask is not a run-length encoding")
    codes = codes - np.uint8(48)
    lasts = np.flatnonzero((codes & 32) == 0).astype(np.int32)  # up to 2²⁹ characters, see MAX_SAMPLE_BYTES
    groups = np.diff(lasts, prepend=np.int32(-1))
    if groups.max() > _GROUPS:
        raise ValueError("a run length of the mask is too large")
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
