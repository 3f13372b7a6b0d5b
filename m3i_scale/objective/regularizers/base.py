"""Base class of collapse prevention, the class for texts and categories, and memories of earlier batches."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from m3i_scale.config.sections import Kind
from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.state import Fp32State


class Regularizer(Kind):
    """Collapse prevention of a target."""

    encoders: ClassVar[tuple[str, ...]] = ("ema", "online", "teacher")
    """Target encoders for which it has an effect and prevents collapse."""
    trains_target: ClassVar[bool] = True
    """Whether gradients reach a target that the student encodes."""
    memory_fields: ClassVar[tuple[str, ...] | None] = None
    """Fields on which a head's memory depends. Targets that share the head must agree in them. None: all fields."""
    within_batch: ClassVar[bool] = False
    """Whether it compares samples within a batch, which needs at least two samples."""


class OtherCandidates(Regularizer):
    """Contrast with the other candidates of P̂: the other texts of the batch, or the other classes."""

    kind: ClassVar[str] = "negatives"
    encoders: ClassVar[tuple[str, ...]] = ("text_tower", "embedding")
    within_batch: ClassVar[bool] = True


class Memory(Fp32State):
    """What a head remembers of earlier batches, identical on all ranks. The base class remembers nothing.

    Every memory has all of these buffers, since checkpoints refer to their names. Unused ones are empty. User-defined
    memories may have more.

    Args:
        width: dimension of z_y.
        momentum: decay m of moving averages over batches.
        sizes: shapes of the buffers that are not empty.
    """

    center_K: Tensor
    correlation_EE: Tensor
    queue_QE: Tensor
    filled: Tensor
    next_row: Tensor
    updates: Tensor

    def __init__(self, width: int, momentum: float = 0.9, **sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.momentum = momentum
        empty = {"center_K": (0,), "correlation_EE": (0, 0), "queue_QE": (0, width)}
        for name, size in (empty | sizes).items():
            self.register_buffer(name, torch.zeros(size))
        for name in ("filled", "next_row", "updates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def update(self, values_BE: Tensor, ranks: Ranks) -> None:
        """Update the memory with the `remember` values of a training batch. Called after all loss terms, with the
        targets of all views."""


class Center(Memory):
    """Mean of the targets' logits over K prototypes (DINO)."""

    def __init__(self, width: int, prototypes: int, momentum: float) -> None:
        super().__init__(width, momentum, center_K=(prototypes,))

    @torch.no_grad()
    def update(self, values_BE: Tensor, ranks: Ranks) -> None:
        """Set c ← m c + (1 − m) · mean of the targets' logits over all ranks."""
        mean_K = ranks.sum(values_BE.float().sum(dim=0)) / (len(values_BE) * ranks.world_size)
        self.center_K.lerp_(mean_K, 1 - self.momentum)


class Correlation(Memory):
    """F, the correlation matrix of unit targets (UniGrad)."""

    def __init__(self, width: int, momentum: float) -> None:
        super().__init__(width, momentum, correlation_EE=(width, width))

    @torch.no_grad()
    def update(self, values_BE: Tensor, ranks: Ranks) -> None:
        """Set F ← m F + (1 − m) · mean of z zᵀ over all ranks; the first batch has weight 1."""
        unit_BE = values_BE.float()
        mean_EE = ranks.sum(unit_BE.T @ unit_BE) / (len(unit_BE) * ranks.world_size)
        weight = (self.updates == 0).float().clamp(min=1 - self.momentum)
        self.correlation_EE.copy_(torch.lerp(self.correlation_EE, mean_EE, weight))
        self.updates += 1


class Queue(Memory):
    """A queue of recent unit targets of all ranks (MoCo)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, queue_QE=(size, width))

    @torch.no_grad()
    def update(self, values_BE: Tensor, ranks: Ranks) -> None:
        rows_GE = ranks.gather(values_BE.detach().float())[-len(self.queue_QE) :]
        size, count = len(self.queue_QE), len(rows_GE)
        place_G = (self.next_row + torch.arange(count, device=rows_GE.device)) % size
        self.queue_QE[place_G] = rows_GE
        self.next_row.copy_((self.next_row + count) % size)
        self.filled.copy_((self.filled + count).clamp(max=size))
