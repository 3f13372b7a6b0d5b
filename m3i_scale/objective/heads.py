"""Projection heads of image targets: projector, predictor and prototypes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from m3i_scale.backbones.base import Backbone, Tokens
from m3i_scale.config import Section
from m3i_scale.config.sections import MAX_CANDIDATES, MAX_LAYERS, MAX_WIDTH
from m3i_scale.objective.ranks import Ranks, standardize
from m3i_scale.objective.state import Fp32State

Norm = Literal["none", "layer", "batch"]


class HeadSpec(Section):
    """Projection head that maps a decoded vector to z_y or ẑ_y. Targets that name the same head share it.

    Prediction and target both use the projector (the EMA copy for targets with an EMA encoder). Only the prediction
    uses the predictor.
    """

    width: int = Field(default=256, ge=2, le=MAX_WIDTH)
    """Dimension of z_y."""
    hidden: int = Field(default=2048, ge=2, le=MAX_WIDTH)
    """Width of the projector's hidden layers."""
    depth: int = Field(default=2, ge=1, le=MAX_LAYERS)
    """Number of linear layers of the projector."""
    norm: Norm = "layer"
    """Norm after every hidden layer. `batch` uses the statistics of the global batch."""
    output_norm: Norm = "none"
    """Norm after the projector's last layer, without learned scale."""
    predictor_depth: int = Field(default=0, ge=0, le=MAX_LAYERS)
    """Number of linear layers of the predictor; 0 for none."""
    predictor_hidden: int = Field(default=512, ge=2, le=MAX_WIDTH)
    """Width of the predictor's hidden layers."""
    prototypes: int = Field(default=0, ge=0, le=MAX_CANDIDATES)
    """Number K of prototypes: unit vectors to which `kind: prototypes` targets compare z_y."""


class BackboneReader(nn.Module, ABC):
    """Base class of heads that read layers of the backbone. Their recipe has one input, which shows the full image."""

    @abstractmethod
    def encode_view(self, backbone: Backbone, images_BCHW: Tensor, progress: float) -> tuple[Tokens, list[Tensor]]:
        """Return the tokens of normalized images, and the maps that the head needs. `progress` is the fraction of the
        training that is done."""


class BatchNorm(nn.Module):
    """Batch norm over the global batch, in fp32. It is only used in training, so it has no running statistics."""

    eps = 1e-5

    def __init__(self, width: int, ranks: Ranks, *, affine: bool) -> None:
        super().__init__()
        self.ranks = ranks
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def reset_parameters(self) -> None:
        """Initialize scale with 1 and offset with 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Normalize (…, D) to mean 0 and variance 1 over all but the last dimension and over all ranks."""
        flat_ND = x_ND.float().flatten(0, -2)
        output_ND = standardize(flat_ND, self.ranks, self.eps)
        if self.weight is not None and self.bias is not None:
            output_ND = output_ND * self.weight.float() + self.bias.float()
        return output_ND.view_as(x_ND).to(x_ND.dtype)


class RunningStatistics(Fp32State):
    """Centering of channels in fp32, by statistics of the global batch in training and running ones in evaluation."""

    eps, momentum = 1e-5, 0.1

    def __init__(self, channels: int, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def centered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, C, …) in fp32 minus the mean of every channel, and the variances of the channels (C)."""
        values, rest = x.float(), [1] * (x.ndim - 2)
        if not self.training:
            return values - self.running_mean.view(-1, *rest), self.running_var
        dims, count = [0, *range(2, x.ndim)], values.numel() // values.shape[1] * self.ranks.world_size
        mean_C = self.ranks.sum_with_gradient(values.sum(dim=dims)) / count
        centered = values - mean_C.view(-1, *rest)
        var_C = self.ranks.sum_with_gradient(centered.square().sum(dim=dims)) / count
        self.running_mean.lerp_(mean_C.detach(), self.momentum)
        self.running_var.lerp_(var_C.detach() * (count / max(count - 1, 1)), self.momentum)
        return centered, var_C


class PrototypeLayer(nn.Module):
    """K learned unit vectors, compared by cosine."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def reset_parameters(self) -> None:
        """Initialize with random directions; their norm has no effect."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, z_BE: Tensor) -> Tensor:
        """Return cosines with all prototypes in fp32: (B, E) → (B, K)."""
        # `F.normalize` launches a dozen kernels over (K, E), `weight_norm` two: half the time of a forward and backward
        # pass of 72 vectors with K = 65,536, E = 256 on a CPU.
        length_K1 = self.weight.new_ones(len(self.weight), 1, dtype=torch.float32)
        return F.normalize(z_BE.float(), dim=-1) @ torch._weight_norm(self.weight.float(), length_K1).T


class ImageHead(nn.Module):
    """A projection head: projector (student and EMA copy), predictor (student only) and prototypes."""

    def __init__(self, input_width: int, spec: HeadSpec, ranks: Ranks, *, online: bool, prototypes: bool) -> None:
        super().__init__()
        self.width = spec.width
        self.projector = _mlp(input_width, spec.hidden, spec.width, spec.depth, spec, ranks)
        if spec.output_norm != "none":
            self.projector.append(_norm(spec.output_norm, spec.width, ranks, affine=False))
        self.predictor: nn.Sequential | None = None
        if online and spec.predictor_depth:
            self.predictor = _mlp(spec.width, spec.predictor_hidden, spec.width, spec.predictor_depth, spec, ranks)
        self.prototypes = PrototypeLayer(spec.width, spec.prototypes) if prototypes else None
        self.compares_rows = any(isinstance(module, BatchNorm) for module in self.modules())
        """Whether the head has batch norm. Each output then depends on all rows of the call, on all ranks."""

    def forward(self, decoded_BD: Tensor, *, predict: bool) -> Tensor:
        """Return ẑ_y (with the predictor) or z_y (without) of decoded vectors: (…, D) → (…, E)."""
        output_BE: Tensor = self.projector(decoded_BD)
        if predict and self.predictor is not None:
            output_BE = self.predictor(output_BE)
        return output_BE


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
