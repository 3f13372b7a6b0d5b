"""Read whole weights of a sharded checkpoint, one by one or block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.layout import BUFFERS, read_meta
from m3i_scale.scale.checkpoint.tensors import AVERAGE, SavedTensors
from m3i_scale.scale.engine_state import MASTER

Which = Literal["student", "momentum"]
HEADS = "heads."
"""What heads remember is part of what they compute: the running statistics of batch norm."""
BLOCK_ELEMENTS = 1 << 22
"""Read at a time: 16 MiB in fp32."""


class SavedWeights(Mapping[str, Tensor]):
    """Gives tensors of a checkpoint under the names of parameters (`student.model.layers.0.…`).

    A tensor is read when it is asked for, and not kept: memory holds what the caller holds.

    Args:
        saved: the tensors of the checkpoint.
        keys: names, and which tensors they stand for.
        dtype: of the tensors that are given.
        statistics: further tensors by name, which no optimizer has.
    """

    def __init__(
        self,
        saved: SavedTensors,
        keys: Mapping[str, str],
        dtype: torch.dtype = torch.float32,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._saved, self._keys, self._dtype = saved, dict(keys), dtype
        self._statistics = dict(statistics or {})

    def __getitem__(self, name: str) -> Tensor:
        statistic = self._statistics.get(name)
        return (self._saved.whole(self._keys[name]) if statistic is None else statistic).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        yield from self._keys
        yield from self._statistics

    def __len__(self) -> int:
        return len(self._keys) + len(self._statistics)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        statistic = self._statistics.get(name)
        return self._saved.shape(self._keys[name]) if statistic is None else tuple(statistic.shape)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill a flat tensor with the range of a tensor that begins at `start`, cast to its type."""
        statistic = self._statistics.get(name)
        if statistic is None:
            self._saved.read_into(self._keys[name], start, out)
        else:
            out.copy_(statistic.flatten()[start : start + out.numel()])

    def read_finite(self, name: str, start: int, out: Tensor) -> None:
        """Fill as `read_into` does, block by block: a change of type takes no second copy of the tensor."""
        for at in range(0, out.numel(), BLOCK_ELEMENTS):
            block = out[at : at + BLOCK_ELEMENTS]
            self.read_into(name, start + at, block)
            if not bool(torch.isfinite(block).all()):
                raise CheckpointError(
                    f"'{name}' has elements that are not finite numbers",
                    where=f"elements {start + at:,} to {start + at + block.numel():,}",
                    why="a model with these weights computes NaN",
                    fix="take an earlier checkpoint of the run",
                )

    def blocks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield a tensor as flat blocks of finite numbers."""
        numel = math.prod(self.shape(name))
        for start in range(0, numel, BLOCK_ELEMENTS):
            block = torch.empty(min(BLOCK_ELEMENTS, numel - start), dtype=dtype)
            self.read_finite(name, start, block)
            yield block


def saved_weights(checkpoint: Path, which: Which, dtype: torch.dtype = torch.float32) -> SavedWeights:
    """Return the weights that a committed checkpoint has trained.

    Args:
        checkpoint: a folder that `verify` finds good.
        which: the values that `student.…` has: the trained ones, or their moving average.
        dtype: of the tensors that are given.
    """
    saved = SavedTensors(checkpoint)
    keys = {name: f"{MASTER}/{name}" for name in saved.names(MASTER)}
    # What balances the groups serves only a resumed run.
    keys = {name: key for name, key in keys.items() if not name.startswith(("states.", "weights."))}
    if which == "momentum":
        averages: dict[str, str] = read_meta(checkpoint).get("averages") or {}
        if not averages:
            raise CheckpointError("the run has no momentum target", where=str(checkpoint), fix="--weights student")
        keys |= {online: f"{AVERAGE}/{target}" for target, online in averages.items()}
        return SavedWeights(saved, keys, dtype)  # statistics are those of the trained weights
    buffers = load_file(checkpoint / BUFFERS)
    statistics = {name: buffer for name, buffer in buffers.items() if name.startswith(HEADS)}
    return SavedWeights(saved, keys, dtype, statistics)


def load_weights(checkpoint: Path, which: Which) -> dict[str, Tensor]:
    """Read all of `saved_weights` into memory, in fp32."""
    return dict(saved_weights(checkpoint, which))
