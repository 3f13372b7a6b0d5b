"""From a decoded vector to z_y or ẑ_y of an image target: projector, predictor, prototypes, and what they remember."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_scale.objective.ranks import Ranks
from m3i_scale.objective.recipe import HeadSpec


class BatchNorm(nn.Module):
    """Normalises every channel with the statistics of the global batch, in fp32. Keeps no running statistics: such
    layers serve the targets, and are not used after the training."""

    eps = 1e-5

    def __init__(self, width: int, ranks: Ranks, *, affine: bool) -> None:
        super().__init__()
        self.ranks = ranks
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def reset_parameters(self) -> None:
        """Scale 1, offset 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """(…, D) → the same, mean 0 and variance 1 over all but the last dimension of all ranks."""
        flat_ND = x_ND.float().flatten(0, -2)
        output_ND = standardize(flat_ND, self.ranks, self.eps)
        if self.weight is not None and self.bias is not None:
            output_ND = output_ND * self.weight.float() + self.bias.float()
        return output_ND.view_as(x_ND).to(x_ND.dtype)


def standardize(x_ND: Tensor, ranks: Ranks, eps: float = 1e-5) -> Tensor:
    """Columns at mean 0 and (biased) variance 1 over the rows of all ranks, with gradient."""
    count = len(x_ND) * ranks.world_size
    mean_D = ranks.sum_with_gradient(x_ND.sum(dim=0)) / count
    centered_ND = x_ND - mean_D
    variance_D = ranks.sum_with_gradient(centered_ND.square().sum(dim=0)) / count
    return centered_ND * (variance_D + eps).rsqrt()


class Prototypes(nn.Module):
    """Cosines with K learnt unit vectors."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def reset_parameters(self) -> None:
        """Directions drawn from the sphere; their length has no effect."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, z_BE: Tensor) -> Tensor:
        """(B, E) → cosines in fp32 (B, K)."""
        return F.normalize(z_BE.float(), dim=-1) @ F.normalize(self.weight.float(), dim=-1).T


class ImageHead(nn.Module):
    """Projector (online, and averaged for momentum targets), predictor (online alone), prototypes."""

    def __init__(self, input_width: int, spec: HeadSpec, ranks: Ranks, *, online: bool, prototypes: bool) -> None:
        super().__init__()
        self.width = spec.width
        self.projector = _mlp(input_width, spec.hidden, spec.width, spec.depth, spec, ranks)
        if spec.output_norm != "none":
            self.projector.append(_norm(spec.output_norm, spec.width, ranks, affine=False))
        self.predictor: nn.Sequential | None = None
        if online and spec.predictor_depth:
            self.predictor = _mlp(spec.width, spec.predictor_hidden, spec.width, spec.predictor_depth, spec, ranks)
        self.prototypes = Prototypes(spec.width, spec.prototypes) if prototypes else None

    def forward(self, decoded_BD: Tensor, *, predict: bool) -> Tensor:
        """(…, D) → ẑ_y (with the predictor) or z_y (without): (…, E)."""
        output_BE: Tensor = self.projector(decoded_BD)
        if predict and self.predictor is not None:
            output_BE = self.predictor(output_BE)
        return output_BE

    def cosines(self, z_BE: Tensor) -> Tensor:
        """z with every prototype: fp32 (B, K).

        Raises:
            ValueError: the head has no prototypes.
        """
        if self.prototypes is None:
            raise ValueError("a head without prototypes")
        cosines_BK: Tensor = self.prototypes(z_BE)
        return cosines_BK


def _mlp(width: int, hidden: int, output: int, depth: int, spec: HeadSpec, ranks: Ranks) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        normed = spec.norm != "none"
        layers.append(nn.Linear(width, hidden, bias=not normed))
        if normed:
            layers.append(_norm(spec.norm, hidden, ranks, affine=True))
        layers.append(nn.GELU())
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, output))


def _norm(kind: str, width: int, ranks: Ranks, *, affine: bool) -> nn.Module:
    if kind == "batch":
        return BatchNorm(width, ranks, affine=affine)
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)


class Fp32State(nn.Module):
    """Buffers that stay in fp32 whatever type the engine gives the model: averages over thousands of batches."""

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As in `nn.Module`. Inside `zero.Init`, new tensors are already of the engine's type."""
        if tensor is not None and tensor.is_floating_point():
            tensor = tensor.float()
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self


class HeadState(Fp32State):
    """What a head remembers of earlier batches, the same on all ranks: a center, a correlation, a queue."""

    center_K: Tensor
    correlation_EE: Tensor
    queue_QE: Tensor
    filled: Tensor
    """How many rows of the queue hold a target."""
    next_row: Tensor
    updates: Tensor

    def __init__(self, spec: HeadSpec, *, center: bool, correlation: bool) -> None:
        super().__init__()
        self.momentum = spec.state_momentum
        sizes = {
            "center_K": (spec.prototypes if center else 0,),
            "correlation_EE": (spec.width, spec.width) if correlation else (0, 0),
            "queue_QE": (spec.queue, spec.width),
        }
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size))
        for name in ("filled", "next_row", "updates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update_center(self, logits_BK: Tensor, ranks: Ranks) -> None:
        """c ← m c + (1 − m) mean of the targets' logits over all ranks (DINO)."""
        mean_K = ranks.sum(logits_BK.float().sum(dim=0)) / (len(logits_BK) * ranks.world_size)
        self.center_K.lerp_(mean_K, 1 - self.momentum)

    @torch.no_grad()
    def update_correlation(self, unit_BE: Tensor, ranks: Ranks) -> None:
        """F ← m F + (1 − m) mean of z zᵀ over all ranks (UniGrad); the first batch counts whole."""
        unit_BE = unit_BE.float()
        mean_EE = ranks.sum(unit_BE.T @ unit_BE) / (len(unit_BE) * ranks.world_size)
        weight = torch.where(self.updates == 0, 1.0, 1 - self.momentum)
        self.correlation_EE.copy_(torch.lerp(self.correlation_EE, mean_EE, weight))
        self.updates += 1

    @torch.no_grad()
    def enqueue(self, unit_BE: Tensor, ranks: Ranks) -> None:
        """The targets of all ranks replace the oldest ones."""
        rows_GE = ranks.gather(unit_BE.detach().float())[-len(self.queue_QE) :]
        size, count = len(self.queue_QE), len(rows_GE)
        place_G = (self.next_row + torch.arange(count, device=rows_GE.device)) % size
        self.queue_QE[place_G] = rows_GE
        self.next_row.copy_((self.next_row + count) % size)
        self.filled.copy_((self.filled + count).clamp(max=size))
