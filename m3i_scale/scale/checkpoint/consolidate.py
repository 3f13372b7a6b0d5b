"""Whole weights from a sharded checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint.state import AVERAGE, read_meta
from m3i_scale.scale.checkpoint.tensors import SavedTensors

Which = Literal["student", "momentum"]


class SavedWeights(Mapping[str, Tensor]):
    """What a committed checkpoint trained, by full parameter name (`student.model.layers.0.…`).

    A tensor is read when it is asked for, and not kept: memory holds what the caller holds.

    Args:
        checkpoint: a folder that `verify` finds good.
        weights: which values `student.…` has: the trained ones, or their moving average.
        dtype: of the tensors that are given.

    Raises:
        CheckpointError: momentum weights of a run without a momentum target.
    """

    def __init__(self, checkpoint: Path, weights: Which, dtype: torch.dtype = torch.float32) -> None:
        self._tensors, self._dtype = SavedTensors(checkpoint), dtype
        self._keys = {name: f"weight/{name}" for name in self._tensors.names("weight")}
        # What balances the groups serves only a resumed run.
        self._keys = {name: key for name, key in self._keys.items() if not name.startswith(("states.", "weights."))}
        if weights == "momentum":
            averaged: dict[str, Any] = read_meta(checkpoint).get("averages") or {}
            if not averaged:
                raise CheckpointError("the run has no momentum target", where=str(checkpoint), fix="--weights student")
            self._keys |= {online: f"{AVERAGE}/{target}" for target, online in averaged.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors.whole(self._keys[name]).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return self._tensors.shape(self._keys[name])

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill a flat tensor with the range of a tensor that begins at `start`, cast to its type.

        Raises:
            CheckpointError: there is no such range, or a file is not as the index says.
        """
        self._tensors.read_into(self._keys[name], start, out)


class KindOf:
    """All tensors of one kind: master weights, or a moment.

    Args:
        saved: of a checkpoint.
        kind: `weight`, `exp_avg`, …
    """

    def __init__(self, saved: SavedTensors, kind: str) -> None:
        self._saved, self._kind = saved, kind

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved.names(self._kind))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        return self._saved.shape(f"{self._kind}/{name}")

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """As `SavedTensors.read_into`."""
        self._saved.read_into(f"{self._kind}/{name}", start, out)


def load_weights(checkpoint: Path, weights: Which) -> dict[str, Tensor]:
    """All of `SavedWeights`, in fp32 and in memory.

    Raises:
        CheckpointError: momentum weights of a run without a momentum target.
    """
    return dict(SavedWeights(checkpoint, weights))
