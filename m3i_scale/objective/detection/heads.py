"""Predict from maps and from regions: the RPN, the box head and the mask head.

They compute in the type of the module; what they predict is computed in fp32 whatever that is, since a box in bf16
would be off by pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_scale.config.detection import MaskRcnn, Regions
from m3i_scale.objective.detection.pyramid import MapNorm
from m3i_scale.objective.segmentation import HeadConv


class _Predictor(nn.Conv2d):
    """Predicts numbers at every place, in fp32."""

    def __init__(self, channels: int, outputs: int, *, std: float) -> None:
        self.std = std
        super().__init__(channels, outputs, kernel_size=1)

    def reset_parameters(self) -> None:
        """Draw small first values."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, outputs, H, W)."""
        bias = None if self.bias is None else self.bias.float()
        return F.conv2d(input.float(), self.weight.float(), bias)


class _RpnConv(nn.Conv2d):
    """Convolves, and starts small, as all of the RPN does."""

    def reset_parameters(self) -> None:
        """Draw first values with a deviation of 0.01."""
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Doubled(nn.ConvTranspose2d):
    """Doubles the side of maps, and starts as `HeadConv` does."""

    def reset_parameters(self) -> None:
        """Draw first values."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Hidden(nn.Linear):
    """Multiplies, and starts from what keeps the variance of its input."""

    def reset_parameters(self) -> None:
        """Draw first values."""
        nn.init.kaiming_uniform_(self.weight, a=1)
        nn.init.zeros_(self.bias)


class RegionHead(nn.Module):
    """Says of every anchor whether it is an object, and how it is moved (RPN)."""

    def __init__(self, regions: Regions, channels: int) -> None:
        super().__init__()
        convs = [_RpnConv(channels, channels, 3, padding=1) for _ in range(regions.convs)]
        self.convs = nn.Sequential(*(layer for conv in convs for layer in (conv, nn.ReLU())))
        self.objectness = _Predictor(channels, len(regions.ratios), std=0.01)
        self.deltas = _Predictor(channels, 4 * len(regions.ratios), std=0.01)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return, by level, logits (B, H · W · A) and deltas (B, H · W · A, 4)."""
        hidden = [self.convs(map_BCHW) for map_BCHW in levels]
        logits = [self.objectness(map_BCHW).permute(0, 2, 3, 1).flatten(1) for map_BCHW in hidden]
        deltas = [self.deltas(map_BCHW).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for map_BCHW in hidden]
        return logits, deltas


class BoxHead(nn.Module):
    """Classifies regions, and moves their boxes."""

    def __init__(self, spec: MaskRcnn, classes: int) -> None:
        super().__init__()
        self.convs = _convolutions(spec, spec.box_convs)
        width, linears = spec.channels * spec.box_side**2, []
        for _ in range(spec.box_linears):
            linears += [_Hidden(width, spec.box_width), nn.ReLU()]
            width = spec.box_width
        self.linears = nn.Sequential(*linears)
        self.classes = _Predictor(width, classes + 1, std=0.01)
        self.deltas = _Predictor(width, 4 * (1 if spec.class_agnostic_boxes else classes), std=0.001)

    def forward(self, cut_RCSS: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (R, K + 1), of the ground last, and deltas (R, K or 1, 4)."""
        hidden_RD = self.linears(self.convs(_as(cut_RCSS, self)).flatten(1))
        logits_RK, deltas_RN = (part(hidden_RD[..., None, None]).flatten(1) for part in (self.classes, self.deltas))
        return logits_RK, deltas_RN.unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Predicts the mask in regions, by class."""

    def __init__(self, spec: MaskRcnn, classes: int) -> None:
        super().__init__()
        self.convs = _convolutions(spec, spec.mask_convs)
        self.doubled = _Doubled(spec.channels, spec.channels, 2, 2)
        self.masks = _Predictor(spec.channels, 1 if spec.class_agnostic_masks else classes, std=0.001)

    def forward(self, cut_RCSS: Tensor, labels_R: Tensor) -> Tensor:
        """Return the logits of the masks of classes: (R, M, M)."""
        logits_RKMM: Tensor = self.masks(F.relu(self.doubled(self.convs(_as(cut_RCSS, self)))))
        one = logits_RKMM.shape[1] == 1
        number_R = torch.arange(len(labels_R), device=labels_R.device)
        return logits_RKMM[number_R, torch.zeros_like(labels_R) if one else labels_R]


def _convolutions(spec: MaskRcnn, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(count):
        normed = spec.norm == "layer"
        layers.append(HeadConv(spec.channels, spec.channels, 3, padding=1, bias=not normed))
        layers += [*([MapNorm(spec.channels)] if normed else []), nn.ReLU()]
    return nn.Sequential(*layers)


def _as(x: Tensor, module: Any) -> Tensor:
    """Return a tensor in the compute type of a module."""
    return x.to(next(module.parameters()).dtype)
