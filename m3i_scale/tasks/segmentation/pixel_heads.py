"""Segmentation heads: a linear one, and UPerNet with the modules of `transformers`. Batch norm uses the statistics of
the global batch on every type of process group, so results do not depend on the number of ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BeitConfig, UperNetConfig
from transformers.models.beit.modeling_beit import BeitFPNNeck
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from m3i_scale.backbones.base import Backbone, Tokens
from m3i_scale.errors import ConfigError
from m3i_scale.objective.heads import BackboneReader, RunningStatistics
from m3i_scale.objective.information import Objective
from m3i_scale.objective.ranks import Ranks, global_count
from m3i_scale.tasks.segmentation.segmentation_heads import LinearSegmentation, UperNetSegmentation


class MapBatchNorm(RunningStatistics):
    """Batch norm of maps in fp32, with running statistics in fp32 for evaluation."""

    def __init__(self, channels: int, ranks: Ranks) -> None:
        super().__init__(channels, ranks)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """Initialize scale with 1 and offset with 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalize and scale maps, in training with the statistics of the global batch."""
        centred_BCHW, var_C = self.centered(x_BCHW)
        scale_C = (var_C + self.eps).rsqrt() * self.weight.float()
        output_BCHW = centred_BCHW * scale_C[:, None, None] + self.bias.float()[:, None, None]
        return output_BCHW.to(x_BCHW.dtype)


class HeadConv(nn.Conv2d):
    """A convolution with Kaiming initialization that preserves the gradient variance after a ReLU."""

    def reset_parameters(self) -> None:
        """Initialize weights (Kaiming) and biases (0)."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _PixelClassifier(nn.Conv2d):
    """Per-pixel linear classifier. Logits start small, so that no class is preferred initially."""

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__(channels, classes, kernel_size=1)
        self.dropout = dropout

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout2d(input, self.dropout, self.training) if self.dropout else input)


class PixelHead(BackboneReader):
    """Base class of semantic segmentation heads."""

    weights: tuple[float, ...] = (1.0,)
    """Loss weight of every prediction of `forward`."""
    layers: tuple[int, ...] = ()
    """Backbone layers, from 1, of which the head needs maps."""

    def encode_view(self, backbone: Backbone, images_BCHW: Tensor, progress: float) -> tuple[Tokens, list[Tensor]]:
        """Return the tokens of normalized images, and the maps of `layers` or of the stages."""
        return backbone.encode_maps(images_BCHW, self.layers)

    @abstractmethod
    def forward(self, map_BDHW: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return logits (B, K, H, W) at any resolution: the prediction, then auxiliary ones for training.

        Args:
            map_BDHW: tokens of the last layer.
            maps: maps returned by `encode_view`.
        """

    def predict(
        self, tokens_BND: Tensor, maps: Sequence[Tensor], grid: tuple[int, int], size: tuple[int, int]
    ) -> Iterator[Tensor]:
        """Yield the outputs of `forward`, each resized when needed: (B, K, H, W).

        Args:
            tokens_BND: tokens of the last layer.
            maps: maps returned by `encode_view`.
            grid: rows and columns of the tokens.
            size: H and W.
        """
        for logits_BKHW in self(tokens_BND.transpose(1, 2).unflatten(2, grid), maps):
            yield resized(logits_BKHW, size)

    def loss(
        self,
        predictions: list[Tensor],
        maps: Sequence[Tensor],
        truth_BHW: Tensor,
        valid_BHW: Tensor,
        distribution: Any,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the predictions' cross-entropies, and the nats of the first prediction.

        Args:
            predictions: outputs of `forward`, resized to the ground truth.
            maps: maps returned by `encode_view`.
            truth_BHW: classes, int64.
            valid_BHW: bool, whether a pixel has a class.
            distribution: P̂ of a class.
            ranks: ranks of the means.
        """
        count = global_count(valid_BHW, ranks)
        losses = [
            distribution.loss(logits_BKHW, truth_BHW, valid_BHW, ranks, count=count) for logits_BKHW in predictions
        ]
        weighted = [weight * loss for weight, (loss, _) in zip(self.weights, losses, strict=True)]
        return torch.stack(weighted).sum(), losses[0][1]


class LinearPixelHead(PixelHead):
    """Linear classifier of patch tokens after batch norm."""

    def __init__(self, spec: LinearSegmentation, backbone: Backbone, classes: int, ranks: Ranks) -> None:
        super().__init__()
        self.norm = MapBatchNorm(backbone.width, ranks)
        self.classifier = _PixelClassifier(backbone.width, classes, spec.dropout)

    def forward(self, map_BDHW: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.classifier(self.norm(map_BDHW))]


class UperNet(PixelHead):
    """UPerNet over maps of four resolutions, with an auxiliary head on the third map."""

    def __init__(self, spec: UperNetSegmentation, backbone: Backbone, classes: int, ranks: Ranks) -> None:
        super().__init__()
        widths = backbone.stage_widths
        self.neck = None
        if not widths:
            self.layers = read_layers(spec, len(backbone.layers))
            if min(backbone.grid) < 2:
                raise ConfigError(
                    "UPerNet needs a grid of two patches or more per side, but the image is one patch",
                    where="backbone.config.image_size",
                    fix="increase backbone.config.image_size",
                )
            widths = [backbone.width] * len(self.layers)
            self.neck = BeitFPNNeck(BeitConfig(hidden_size=backbone.width))
        elif spec.out_layers is not None:
            raise ConfigError(
                "out_layers has no effect: UPerNet reads all stages of this backbone",
                where="task.head.out_layers",
                fix="leave it out",
            )
        config = UperNetConfig(hidden_size=spec.channels, num_labels=classes, auxiliary_in_channels=None)
        self.decode_head = UperNetHead(config, widths)
        self.auxiliary_head = None
        if spec.auxiliary_weight:
            self.auxiliary_head = UperNetFCNHead(config, widths)
            self.weights = (1.0, spec.auxiliary_weight)
        _replace_parts(self, spec.dropout, ranks)

    def forward(self, map_BDHW: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return logits at the resolution of the first map, and auxiliary logits at the resolution of the third."""
        pyramid = maps if self.neck is None else self.neck(maps)
        heads = [self.decode_head] if self.auxiliary_head is None else [self.decode_head, self.auxiliary_head]
        return [head(pyramid) for head in heads]


def read_layers(spec: UperNetSegmentation, depth: int) -> tuple[int, ...]:
    """Return the layers of a plain Transformer that UPerNet uses, from 1."""
    if spec.out_layers is None:
        layers = tuple(max(round(depth * share), 1) for share in (1 / 3, 1 / 2, 2 / 3, 1))
        if len(set(layers)) < len(layers):
            raise ConfigError(
                f"UPerNet needs four different layers, but the backbone has {depth}",
                where="task.head.kind: upernet",
                fix="set task.head=linear",
            )
        return layers
    if spec.out_layers[-1] > depth:
        raise ConfigError(
            f"task.head.out_layers must be from 1 to {depth}, the number of backbone layers, got {spec.out_layers[-1]}",
            where="task.head.out_layers",
            fix="set task.head.out_layers=null",
        )
    return spec.out_layers


def _replace_parts(module: nn.Module, dropout: float, ranks: Ranks) -> None:
    """Replace batch norm (now over all ranks), dropout, and initialization (as in mmsegmentation)."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, MapBatchNorm(child.num_features, ranks))
        elif isinstance(child, nn.Conv2d) and name == "classifier":
            setattr(module, name, _PixelClassifier(child.in_channels, child.out_channels, dropout))
        elif isinstance(child, nn.Conv2d):
            own = HeadConv(
                child.in_channels,
                child.out_channels,
                cast(tuple[int, int], child.kernel_size),
                padding=cast(tuple[int, int], child.padding),
                dilation=cast(tuple[int, int], child.dilation),
                bias=child.bias is not None,
            )
            setattr(module, name, own)
        else:
            _replace_parts(child, dropout, ranks)


@torch.no_grad()
def segment(objective: Objective, pixels_BCHW: Tensor) -> Tensor:
    """Return per-pixel class logits (B, K, H, W) of normalized images."""
    head = cast(PixelHead, objective.reader)
    (_, tokens_BND), maps = head.encode_view(objective.student, pixels_BCHW, objective.progress)
    size = pixels_BCHW.shape[2], pixels_BCHW.shape[3]
    return next(head.predict(tokens_BND, maps, objective.student.grid_of(pixels_BCHW), size))


def resized(logits_BKHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits to `size` (height, width), in fp32."""
    return F.interpolate(logits_BKHW.float(), size=size, mode="bilinear", align_corners=False)


def overlaps(predicted_BHW: Tensor, classes_BHW: Tensor, valid_BHW: Tensor, count: int) -> Tensor:
    """Count pixels per class in the intersection, the ground truth and the prediction: int64 (3, K). `valid_BHW` (bool)
    selects pixels with a class."""
    counted = (
        (classes_BHW, valid_BHW & (predicted_BHW == classes_BHW)),
        (classes_BHW, valid_BHW),
        (predicted_BHW, valid_BHW),
    )
    rows = [torch.bincount(of.where(where, count).flatten(), minlength=count + 1)[:count] for of, where in counted]
    return torch.stack(rows)


def mean_iou(overlaps_3K: Tensor) -> float:
    """Return the mean intersection over union of classes in ground truth or prediction; 0 if there are none. As in
    mmsegmentation, a class that is only predicted counts as 0."""
    both_K, truth_K, predicted_K = overlaps_3K.double()
    either_K = truth_K + predicted_K - both_K
    iou_K = both_K[either_K > 0] / either_K[either_K > 0]
    return float(iou_K.mean()) if len(iou_K) else 0.0
