"""The family of masks, and the random numbers that they are drawn from.

Masks are a pure function of the sample's seed, so they are the same on any device and for any number of ranks.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from m3i_scale.config.kinds import Kind


class Mask(Kind):
    """A law of hidden patches."""

    kinds: ClassVar[dict[str, type[Kind]]] = {}

    def order(self, seeds_B: Tensor, grid: tuple[int, int], stream: int) -> Tensor:
        """Return a permutation of the patches per sample, int64 (B, N). A mask of any ratio hides a tail of it.

        Args:
            seeds_B: seed of every sample.
            grid: rows and columns of patches.
            stream: another one for every input, so that their masks do not depend on each other; a mask may also use
                the 15 that follow.
        """
        raise NotImplementedError


def hash_uniform(seeds_B: Tensor, count: int, stream: int) -> Tensor:
    """Return uniform numbers in [0, 1): float32 (B, count), a pure function of (seed, stream, index).

    The mixing is that of SplitMix64, in wrapping int64 arithmetic, which every device computes alike.
    """
    index_N = torch.arange(1, count + 1, device=seeds_B.device, dtype=torch.int64)
    offset = (stream * 2685821657736338717 + 2**63) % 2**64 - 2**63  # wrapped here: Python integers do not
    state_BN = seeds_B[:, None] + index_N * -7046029254386353131 + offset
    state_BN = (state_BN ^ _shift(state_BN, 30)) * -4658895280553007687
    state_BN = (state_BN ^ _shift(state_BN, 27)) * -7723592293110705685
    state_BN = state_BN ^ _shift(state_BN, 31)
    return _shift(state_BN, 40).to(torch.float32) * 2.0**-24


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right, logically."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
