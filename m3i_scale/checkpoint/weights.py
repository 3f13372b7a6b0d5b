"""Full weights of a sharded checkpoint, read one by one or block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from m3i_scale.checkpoint.layout import BUFFERS, read_meta
from m3i_scale.checkpoint.tensors import AVERAGE, SavedTensors
from m3i_scale.engine.engine_state import MASTER
from m3i_scale.errors import CheckpointError

Which = Literal["student", "ema"]
HEADS = "heads."
"""Buffers of heads affect their outputs: the running statistics of batch norm."""
BLOCK_ELEMENTS = 1 << 22
"""Elements read at a time: 16 MiB in fp32."""


class SavedWeights(Mapping[str, Tensor]):
    """Tensors of a checkpoint by parameter name (`student.model.layers.0.…`), read on access and not cached.

    Args:
        saved: the tensors of the checkpoint.
        keys: keys of the saved tensors by parameter name.
        dtype: dtype of the returned tensors.
        statistics: further tensors by name, which have no optimizer state.
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
        """Fill a flat tensor with the range of a tensor that begins at `start`, cast to the dtype of `out`."""
        statistic = self._statistics.get(name)
        if statistic is None:
            self._saved.read_into(self._keys[name], start, out)
        else:
            out.copy_(statistic.flatten()[start : start + out.numel()])

    def read_finite(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` like `read_into`, and raise CheckpointError for non-finite elements. It reads in blocks, so a
        dtype change needs no second copy of the tensor."""
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
        """Yield a tensor as flat blocks; raise CheckpointError for non-finite elements."""
        numel = math.prod(self.shape(name))
        for start in range(0, numel, BLOCK_ELEMENTS):
            block = torch.empty(min(BLOCK_ELEMENTS, numel - start), dtype=dtype)
            self.read_finite(name, start, block)
            yield block


def saved_weights(checkpoint: Path, which: Which, dtype: torch.dtype = torch.float32) -> SavedWeights:
    """Return the weights of a committed checkpoint that passes `verify`. `which` selects the values for `student.…`:
    the trained weights, or their EMA."""
    saved = SavedTensors(checkpoint)
    keys = {name: f"{MASTER}/{name}" for name in saved.names(MASTER)}
    # Loss-weighting state serves only a resumed run.
    keys = {name: key for name, key in keys.items() if not name.startswith(("states.", "weights."))}
    if which == "ema":
        averages: dict[str, str] = read_meta(checkpoint).get("averages") or {}
        if not averages:
            raise CheckpointError("the run has no EMA teacher", where=str(checkpoint), fix="--weights student")
        keys |= {online: f"{AVERAGE}/{target}" for target, online in averages.items()}
        return SavedWeights(saved, keys, dtype)  # statistics belong to the trained weights only
    buffers = load_file(checkpoint / BUFFERS)
    statistics = {name: buffer for name, buffer in buffers.items() if name.startswith(HEADS)}
    return SavedWeights(saved, keys, dtype, statistics)
