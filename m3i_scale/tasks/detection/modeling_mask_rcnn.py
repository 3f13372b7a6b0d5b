"""Mask R-CNN on a plain Transformer, as in ViTDet (Li et al., ECCV 2022), with modules of torchvision.

Modules compute in their dtype. Predictions, anchors, boxes and RoIAlign are always fp32, since a box in bf16 would be
off by pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align
from transformers import AttentionInterface, CLIPVisionModel, Dinov2Model, PreTrainedModel, ViTModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import ModelOutput

from .configuration_mask_rcnn import HeadFields, MaskRcnnConfig, RegionFields

STRIDES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Strides of the levels, in patches of the backbone."""
KERNEL = "vitdet_windows"
"""Name of the attention function in `transformers`."""
_ANCHOR_STRIDES = 8
"""Anchor size of a level in strides (`scales` of mmdetection). Neighbors overlap for any image size."""
_CANONICAL_SIDE, _CANONICAL_STRIDE = 224, 16
"""A region with the size of an ImageNet image is assigned to the level of this stride (FPN, equation 1)."""


class WindowAttention(nn.Module):
    """Attention of one layer within windows, or over the full image."""

    def __init__(self, side: int, window: int, head_width: int, *, relative: bool) -> None:
        super().__init__()
        self.side, self.window = side, window
        count = 2 * window - 1
        self.rows = nn.Parameter(torch.zeros(count, head_width)) if relative else None
        self.columns = nn.Parameter(torch.zeros(count, head_width)) if relative else None
        """Relative position embeddings, multiplied with queries, by distance."""

    def reset_parameters(self) -> None:
        """Initialize with zeros: no effect of distance."""
        for table in (self.rows, self.columns):
            if table is not None:
                nn.init.zeros_(table)

    def forward(self, module: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float) -> Tensor:
        """Return the attention output (B, N, heads, D) for queries, keys and values (B, heads, N, D)."""
        query, key, value = (
            self._split(x, getattr(module, name).bias)
            for x, name in ((query, "q_proj"), (key, "k_proj"), (value, "v_proj"))
        )
        mask = self._distances(query)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
        return self._joined(read)

    def _split(self, x_BHND: Tensor, bias: Tensor | None) -> Tensor:
        """Split tokens into windows: (windows · B, heads, tokens of a window, D).

        Windows across the border are padded with projections of zeros, to which tokens attend, as in ViTDet.
        """
        batch, heads, _, width = x_BHND.shape
        x: Tensor = x_BHND.unflatten(2, (self.side, self.side))
        per_side = -(-self.side // self.window)
        whole = per_side * self.window
        if whole > self.side:
            empty = x.new_zeros(heads * width) if bias is None else bias.to(x.dtype)
            filled = empty.view(1, heads, 1, 1, width).repeat(batch, 1, whole, whole, 1)
            filled[:, :, : self.side, : self.side] = x
            x = filled
        x = x.reshape(batch, heads, per_side, self.window, per_side, self.window, width)
        return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(batch * per_side**2, heads, self.window**2, width)

    def _joined(self, x: Tensor) -> Tensor:
        per_side = -(-self.side // self.window)
        whole = per_side * self.window
        x = x.unflatten(2, (self.window, self.window)).unflatten(0, (-1, per_side, per_side))
        x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, whole, whole, x.shape[3], x.shape[6])
        return x[:, : self.side, : self.side].flatten(1, 2)

    def _distances(self, query: Tensor) -> Tensor | None:
        """Return the additive relative position bias of attention scores."""
        if self.rows is None or self.columns is None:
            return None
        places = torch.arange(self.window, device=query.device)
        distance = places[:, None] - places[None, :] + self.window - 1
        by_place = query.unflatten(2, (self.window, self.window))
        rows = torch.einsum("bhyxd,ykd->bhyxk", by_place, self.rows[distance])
        columns = torch.einsum("bhyxd,xkd->bhyxk", by_place, self.columns[distance])
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    windows: WindowAttention | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function for layers of `transformers`; without windows, plain SDPA."""
    if windows is None or scaling is None:
        read, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return read, None
    return windows(module, query, key, value, dropout, scaling), None


AttentionInterface.register(KERNEL, _attend)


class WindowedLayers(nn.Module):
    """The layers of a plain Transformer without class token, each with windowed attention. The attention function of
    the stock layers splits and joins windows, so layers must be built with `KERNEL`."""

    def __init__(self, side: int, windows: Sequence[int], head_width: int, *, relative: bool) -> None:
        super().__init__()
        self.side, self.sides, self.relative = side, list(windows), relative
        self.layers = nn.ModuleList(WindowAttention(side, window, head_width, relative=relative) for window in windows)

    def forward(self, layers: Iterable[nn.Module], tokens_BND: Tensor) -> Tensor:
        """Return the last layer's map before the final norm, (B, D, H, W), for embedded patches (B, H · W, D)."""
        for layer, windows in zip(layers, self.layers, strict=True):
            tokens_BND = layer(tokens_BND, None, windows=windows)
        map_BDHW: Tensor = tokens_BND.transpose(1, 2).unflatten(2, (self.side, self.side))
        return map_BDHW


class MapNorm(nn.Module):
    """LayerNorm over channels at every position, in fp32."""

    eps = 1e-6

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """Initialize scale with 1 and offset with 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalize a map; shape and dtype do not change."""
        x_BHWC = x_BCHW.permute(0, 2, 3, 1).float()
        normed_BHWC = F.layer_norm(x_BHWC, x_BHWC.shape[-1:], self.weight.float(), self.bias.float(), self.eps)
        return normed_BHWC.permute(0, 3, 1, 2).to(x_BCHW.dtype)


def _norm(channels: int, there: bool) -> list[nn.Module]:
    return [MapNorm(channels)] if there else []


class SimplePyramid(nn.Module):
    """Simple feature pyramid of ViTDet: scales ×4, ×2, ×1 and ×½, and a stride-2 subsampling of the last level."""

    def __init__(self, width: int, channels: int, *, norm: bool) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        doubled = nn.ConvTranspose2d(width, half, 2, 2)
        scaled: list[tuple[list[nn.Module], int]] = [
            ([doubled, *_norm(half, norm), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)], quarter),
            ([nn.ConvTranspose2d(width, half, 2, 2)], half),
            ([], width),
            ([nn.MaxPool2d(2, 2)], width),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(inner, channels, 1, bias=not norm),
                *_norm(channels, norm),
                nn.Conv2d(channels, channels, 3, padding=1, bias=not norm),
                *_norm(channels, norm),
            )
            for layers, inner in scaled
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return five maps (B, C, H, W) from one, the largest first."""
        (map_BDHW,) = maps
        levels = [level(map_BDHW) for level in self.levels]
        return [*levels, levels[-1][:, :, ::2, ::2]]


class _Predictor(nn.Conv2d):
    """A 1 × 1 convolution in fp32."""

    def __init__(self, channels: int, outputs: int, *, std: float) -> None:
        self.std = std
        super().__init__(channels, outputs, kernel_size=1)

    def reset_parameters(self) -> None:
        """Initialize with small weights."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, outputs, H, W)."""
        bias = None if self.bias is None else self.bias.float()
        return F.conv2d(input.float(), self.weight.float(), bias)


class _Conv(nn.Conv2d):
    """A 3 × 3 convolution. The RPN starts with small weights, other heads with Kaiming initialization for ReLU."""

    def __init__(self, channels: int, *, bias: bool = True, small: bool = False) -> None:
        self.small = small
        super().__init__(channels, channels, 3, padding=1, bias=bias)

    def reset_parameters(self) -> None:
        """Initialize weights (normal or Kaiming) and biases (0)."""
        if self.small:
            nn.init.normal_(self.weight, std=0.01)
        else:
            nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Doubled(nn.ConvTranspose2d):
    """A transposed convolution that doubles the resolution; initialized as the convolutions of heads."""

    def reset_parameters(self) -> None:
        """Initialize weights (Kaiming) and biases (0)."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Hidden(nn.Linear):
    """A linear layer with initialization that preserves the variance of its input."""

    def reset_parameters(self) -> None:
        """Initialize weights (Kaiming uniform) and biases (0)."""
        nn.init.kaiming_uniform_(self.weight, a=1)
        nn.init.zeros_(self.bias)


class RegionHead(nn.Module):
    """RPN head: objectness and box deltas of every anchor."""

    def __init__(self, regions: RegionFields, channels: int) -> None:
        super().__init__()
        convs = [_Conv(channels, small=True) for _ in range(regions.convs)]
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
    """Classification and box regression of regions."""

    def __init__(self, spec: HeadFields, classes: int) -> None:
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
        """Return logits (R, K + 1), with the background last, and deltas (R, K or 1, 4)."""
        hidden_RD = self.linears(self.convs(_as(cut_RCSS, self)).flatten(1))
        logits_RK, deltas_RN = (part(hidden_RD[..., None, None]).flatten(1) for part in (self.classes, self.deltas))
        return logits_RK, deltas_RN.unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Mask prediction in regions, by class."""

    def __init__(self, spec: HeadFields, classes: int) -> None:
        super().__init__()
        self.convs = _convolutions(spec, spec.mask_convs)
        self.doubled = _Doubled(spec.channels, spec.channels, 2, 2)
        self.masks = _Predictor(spec.channels, 1 if spec.class_agnostic_masks else classes, std=0.001)

    def forward(self, cut_RCSS: Tensor, labels_R: Tensor) -> Tensor:
        """Return mask logits for the given classes: (R, M, M)."""
        logits_RKMM: Tensor = self.masks(F.relu(self.doubled(self.convs(_as(cut_RCSS, self)))))
        one = logits_RKMM.shape[1] == 1
        number_R = torch.arange(len(labels_R), device=labels_R.device)
        return logits_RKMM[number_R, torch.zeros_like(labels_R) if one else labels_R]


def _convolutions(spec: HeadFields, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    normed = spec.norm == "layer"
    for _ in range(count):
        layers += [_Conv(spec.channels, bias=not normed), *_norm(spec.channels, normed), nn.ReLU()]
    return nn.Sequential(*layers)


def _as(x: Tensor, module: Any) -> Tensor:
    return x.to(next(module.parameters()).dtype)


def anchors(
    regions: RegionFields, sides: Sequence[tuple[int, int]], strides: Sequence[float], like: Tensor
) -> list[Tensor]:
    """Return the anchors of every level, (H · W · A, 4), around the upper left corner of every position.

    Args:
        regions: sizes and aspect ratios.
        sides: rows and columns of every level.
        strides: stride of every level in pixels.
        like: a tensor on the target device.
    """
    found = []
    sizes = regions.sizes or [_ANCHOR_STRIDES * stride for stride in strides]
    for (rows, columns), stride, size in zip(sides, strides, sizes, strict=True):
        ratio_A = torch.tensor(regions.ratios, device="cpu")
        width_A = size / ratio_A.sqrt()
        height_A = ratio_A * width_A
        cells_A4 = torch.stack([-width_A, -height_A, width_A, height_A], dim=1) / 2
        y_H, x_W = (torch.arange(count, device=like.device) * stride for count in (rows, columns))
        y_HW, x_HW = torch.meshgrid(y_H, x_W, indexing="ij")
        places_HW4 = torch.stack([x_HW, y_HW, x_HW, y_HW], dim=-1)
        cells_A4 = cells_A4.to(like.device, non_blocking=True)
        found.append((places_HW4[:, :, None] + cells_A4).reshape(-1, 4))
    return found


@torch.no_grad()
def propose(
    regions: RegionFields,
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    sizes: Sequence[tuple[float, float]],
    *,
    training: bool,
) -> list[Tensor]:
    """Return the top regions of every image (R, 4), at most `after_nms`.

    Args:
        regions: number of regions and NMS threshold.
        logits: objectness of anchors by level (B, N).
        deltas: box deltas of anchors by level (B, N, 4).
        anchors: anchors by level (N, 4).
        sizes: height and width of every image before padding.
        training: whether to use the numbers for training.
    """
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, scores, levels = [], [], []
    for level, (logits_BN, deltas_BN4, anchors_N4) in enumerate(zip(logits, deltas, anchors, strict=True)):
        count = min(regions.before_nms[not training], logits_BN.shape[1])
        scores_BT, best_BT = logits_BN.detach().topk(count, dim=1)
        moved_BT4 = deltas_BN4.detach().gather(1, best_BT[..., None].expand(-1, -1, 4))
        decoded_R4 = coder.decode_single(moved_BT4.flatten(0, 1), anchors_N4[best_BT].flatten(0, 1))
        boxes.append(decoded_R4.view(len(logits_BN), -1, 4))
        scores.append(scores_BT)
        levels.append(torch.full((count,), level, device=logits_BN.device))
    level_T, kept = torch.cat(levels), []
    for box_T4, score_T, size in zip(torch.cat(boxes, dim=1), torch.cat(scores, dim=1), sizes, strict=True):
        clipped_T4 = clip_boxes_to_image(box_T4, size)
        there_T = box_T4.isfinite().all(dim=1) & score_T.isfinite() & has_area(clipped_T4)
        (place_R,) = there_T.nonzero(as_tuple=True)
        clipped_R4 = clipped_T4[place_R]
        best_R = batched_nms(clipped_R4, score_T[place_R], level_T[place_R], regions.nms_iou)
        kept.append(clipped_R4[best_R[: regions.after_nms[not training]]])
    return kept


def cut_out(
    spec: HeadFields, levels: Sequence[Tensor], strides: Sequence[float], boxes: Sequence[Tensor], side: int
) -> Tensor:
    """Crop regions with RoIAlign, each from the level of its size: fp32 (R, C, side, side).

    Every level is part of the result, with a gradient of zero if no region has its size.

    Args:
        spec: sampling settings.
        levels: maps (B, C, H, W) in fp32, the largest first.
        strides: strides of the levels in pixels; further ones are ignored.
        boxes: regions by image (R, 4).
        side: resolution of the result.
    """
    image_R1 = torch.cat([box_R4.new_full((len(box_R4), 1), number) for number, box_R4 in enumerate(boxes)])
    rois_R5 = torch.cat([image_R1, torch.cat(list(boxes))], dim=1)
    side_R = ((rois_R5[:, 3] - rois_R5[:, 1]) * (rois_R5[:, 4] - rois_R5[:, 2])).sqrt()
    canonical = math.log2(_CANONICAL_STRIDE / strides[0])
    level_R = (canonical + (side_R / _CANONICAL_SIDE + 1e-8).log2()).floor().clamp(0, len(levels) - 1)
    found_RCSS = levels[0].new_zeros((len(rois_R5), levels[0].shape[1], side, side))
    for number, (map_BCHW, stride) in enumerate(zip(levels, strides[: len(levels)], strict=True)):
        there_L = _where(level_R == number, number)
        cut_LCSS = roi_align(map_BCHW, rois_R5[there_L], side, 1 / stride, spec.sampling_ratio, spec.aligned)
        found_RCSS = found_RCSS.index_put((there_L,), cut_LCSS)
    return found_RCSS


def choose(spec: HeadFields, scores_RK: Tensor, boxes_RK4: Tensor, size: tuple[float, float]) -> tuple[Tensor, ...]:
    """Return boxes (N, 4), scores and classes of the detections of an image, the best first.

    Args:
        spec: minimum score, NMS threshold and number of detections.
        scores_RK: scores of the regions by class.
        boxes_RK4: boxes of the regions by class, or class-agnostic ones (R, 1, 4).
        size: height and width of the image before padding.
    """
    finite_R = boxes_RK4.flatten(1).isfinite().all(dim=1) & scores_RK.isfinite().all(dim=1)
    boxes_RK4 = clip_boxes_to_image(boxes_RK4, size)
    region_N, label_N = ((scores_RK > spec.score_above) & finite_R[:, None]).nonzero(as_tuple=True)
    box_N4 = boxes_RK4[region_N, label_N if boxes_RK4.shape[1] > 1 else 0]
    score_N = scores_RK[region_N, label_N]
    best_N = batched_nms(box_N4, score_N, label_N, spec.nms_iou)[: spec.detections]
    return box_N4[best_N], score_N[best_N], label_N[best_N]


def scaled(boxes_N4: Tensor, size: tuple[float, float], own: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Scale boxes to the original image and clip them. Return boxes (N, 4) and which have an area, bool (N).

    Args:
        boxes_N4: boxes in the batch's image.
        size: height and width in the batch's image, before padding.
        own: height and width of the original image.
    """
    by_y, by_x = own[0] / size[0], own[1] / size[1]
    boxes_N4 = clip_boxes_to_image(boxes_N4 * boxes_N4.new_tensor([by_x, by_y, by_x, by_y]), own)
    return boxes_N4, has_area(boxes_N4)


def paste_masks(masks_NMM: Tensor, boxes_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks of detections into the image, with a threshold of one half: bool (N, H, W).

    Args:
        masks_NMM: soft masks within their boxes.
        boxes_N4: x1, y1, x2, y2 in the image.
        size: H and W.
    """
    (height, width), device = size, boxes_N4.device
    whole_NHW = torch.zeros(len(boxes_N4), height, width, dtype=torch.bool, device=device)
    for whole_HW, mask_MM, (x1, y1, x2, y2) in zip(whole_NHW, masks_NMM.float(), boxes_N4.float(), strict=True):
        x_W = (torch.arange(width, device=device) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y_H = (torch.arange(height, device=device) + 0.5 - y1) / (y2 - y1) * 2 - 1
        places_HW2 = torch.stack(torch.meshgrid(x_W, y_H, indexing="xy"), dim=-1)
        whole_HW.copy_(F.grid_sample(mask_MM[None, None], places_HW2[None], align_corners=False)[0, 0] >= 0.5)
    return whole_NHW


def _where(mask_R: Tensor, level: int) -> Tensor:
    """Return the indices of regions of a level. On meta tensors, all regions belong to the first level."""
    if mask_R.is_meta:
        return torch.arange(0 if level else len(mask_R), device="meta")
    return mask_R.nonzero()[:, 0]


def has_area(boxes_N4: Tensor) -> Tensor:
    """Return which boxes (…, 4) have an area."""
    return (boxes_N4[..., 2] > boxes_N4[..., 0]) & (boxes_N4[..., 3] > boxes_N4[..., 1])


@dataclass(frozen=True)
class Detections:
    """The detections of one image, the best first."""

    boxes_N4: Tensor
    """float32: x1, y1, x2, y2 at the original image size."""
    scores_N: Tensor
    labels_N: Tensor
    masks_NMM: Tensor | None
    """Soft masks within the boxes, for `paste_masks`; None for a Faster R-CNN."""


class MaskRcnnHead(nn.Module):
    """Mask R-CNN for square images, padded at the right and at the bottom.

    Args:
        head: settings of modules and detections.
        classes: K.
        patch_size: patch size of the backbone in pixels.
        windows: windowed layers of a plain Transformer.
        pyramid: converts the backbone's maps to five levels.
    """

    def __init__(
        self, head: HeadFields, classes: int, patch_size: int, windows: WindowedLayers | None, pyramid: nn.Module
    ) -> None:
        super().__init__()
        self.head = head
        self.strides = [patch_size * stride for stride in STRIDES]
        self.windows, self.pyramid = windows, pyramid
        self.regions = RegionHead(head.regions, head.channels)
        self.boxes = BoxHead(head, classes)
        self.masks = MaskHead(head, classes) if head.masks else None

    @torch.no_grad()
    def detect(self, levels: Sequence[Tensor], sizes_B2: Tensor, own_B2: Tensor) -> list[Detections]:
        """Return the detections of every image.

        Args:
            levels: maps (B, C, H, W) of the pyramid.
            sizes_B2: height and width of the images before padding.
            own_B2: height and width of the original images, to which boxes are scaled.
        """
        spec, sizes = self.head, sizes_of(sizes_B2)
        proposals = propose(spec.regions, *self.predict_regions(levels), sizes, training=False)
        maps = [map_BCHW.float() for map_BCHW in levels[:4]]
        logits_RK, deltas_RK4 = self.boxes(cut_out(spec, maps, self.strides, proposals, spec.box_side))
        scores_RK = (logits_RK.sigmoid() if spec.classifier == "sigmoid" else logits_RK.softmax(dim=1))[:, :-1]
        coder, counts = BoxCoder(spec.box_weights), [len(boxes_R4) for boxes_R4 in proposals]
        boxes_RK4 = coder.decode_single(deltas_RK4.flatten(1), torch.cat(proposals)).view(deltas_RK4.shape)
        by_image = zip(scores_RK.split(counts), boxes_RK4.split(counts), sizes, strict=True)
        found = [choose(spec, *image) for image in by_image]
        masks: Sequence[Tensor | None] = [None] * len(found)
        if self.masks is not None:
            cut = cut_out(spec, maps, self.strides, [boxes_N4 for boxes_N4, *_ in found], spec.mask_side)
            soft_NMM = self.masks(cut, torch.cat([labels_N for *_, labels_N in found])).sigmoid()
            masks = soft_NMM.split([len(boxes_N4) for boxes_N4, *_ in found])
        detections = []
        for one, masks_NMM, size, own in zip(found, masks, sizes, sizes_of(own_B2), strict=True):
            boxes_N4, there_N = scaled(one[0], size, own)
            shown_NMM = None if masks_NMM is None else masks_NMM[there_N]
            detections.append(Detections(boxes_N4[there_N], one[1][there_N], one[2][there_N], shown_NMM))
        return detections

    def predict_regions(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return objectness logits, deltas and anchors by level."""
        sides = [(map_BCHW.shape[2], map_BCHW.shape[3]) for map_BCHW in levels]
        return *self.regions(levels), anchors(self.head.regions, sides, self.strides, levels[0])


def sizes_of(sizes_B2: Tensor) -> list[tuple[float, float]]:
    """Return heights and widths as Python numbers."""
    return [(float(height), float(width)) for height, width in sizes_B2.tolist()]


@dataclass
class MaskRcnnOutput(ModelOutput):
    """The detections of a batch of images, the best first. The padding of an image has label −1 and score 0."""

    scores: Tensor | None = None
    """(B, N)."""
    labels: Tensor | None = None
    """(B, N): keys of `config.id2label`."""
    boxes: Tensor | None = None
    """(B, N, 4): x1, y1, x2, y2 in pixels of the image."""
    masks: Tensor | None = None
    """(B, N, M, M): soft masks within the boxes; see `paste_masks`. None without a mask head."""


def joined(found: Sequence[Detections]) -> MaskRcnnOutput:
    """Combine the detections of several images into padded tensors."""
    masks = [one.masks_NMM for one in found if one.masks_NMM is not None]
    return MaskRcnnOutput(
        scores=pad_sequence([one.scores_N for one in found], batch_first=True),
        labels=pad_sequence([one.labels_N for one in found], batch_first=True, padding_value=-1),
        boxes=pad_sequence([one.boxes_N4 for one in found], batch_first=True),
        masks=pad_sequence(masks, batch_first=True) if masks else None,
    )


class MaskRcnnForObjectDetection(PreTrainedModel):
    """Mask R-CNN with a ViT, DINOv2 or CLIP vision model as backbone."""

    config_class = MaskRcnnConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    paste_masks = staticmethod(paste_masks)
    _backbones: ClassVar = {"vit": ViTModel, "dinov2": Dinov2Model, "clip_vision_model": CLIPVisionModel}

    def __init__(self, config: MaskRcnnConfig) -> None:
        super().__init__(config)
        shape, spec = config.backbone_config, HeadFields.of(config.head or {})
        options = {"add_pooling_layer": False} if shape.model_type == "vit" else {}
        self.backbone = self._backbones[shape.model_type](shape, **options)
        self.backbone.config._attn_implementation = KERNEL
        if len(config.windows) != shape.num_hidden_layers or min(config.windows) < 1:
            raise ValueError("windows: the side of those of every layer, at least 1")
        width, side = shape.hidden_size // shape.num_attention_heads, shape.image_size // shape.patch_size
        windows = WindowedLayers(side, config.windows, width, relative=config.relative_positions)
        pyramid = SimplePyramid(shape.hidden_size, spec.channels, norm=spec.norm == "layer")
        self.detector = MaskRcnnHead(spec, config.num_labels, shape.patch_size, windows, pyramid)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        reshaped_input_sizes: Tensor | None = None,
        original_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskRcnnOutput:
        """Detect objects in images (B, 3, S, S), which may be padded at the right and at the bottom.

        Args:
            pixel_values: normalized images; zero in the padding.
            reshaped_input_sizes: (B, 2), height and width without padding; None: no padding.
            original_sizes: (B, 2), height and width to which boxes are scaled; None: the same.
        """
        if reshaped_input_sizes is None:
            reshaped_input_sizes = torch.tensor([pixel_values.shape[-2:]] * len(pixel_values))
        own_B2 = reshaped_input_sizes if original_sizes is None else original_sizes
        return joined(self.detect(pixel_values, reshaped_input_sizes, own_B2))

    @torch.no_grad()
    def detect(self, pixels_BCHW: Tensor, sizes_B2: Tensor, own_B2: Tensor) -> list[Detections]:
        """Return the detections of every image; for the arguments see `forward`."""
        windows = cast(WindowedLayers, self.detector.windows)
        map_BDHW = windows(*self._embedded(pixels_BCHW.to(self.dtype)))
        return self.detector.detect(self.detector.pyramid([map_BDHW]), sizes_B2, own_B2)

    def _embedded(self, pixels_BCHW: Tensor) -> tuple[Iterable[nn.Module], Tensor]:
        """Return the backbone's layers and the input of the first one."""
        backbone = self.backbone
        tokens_BND = backbone.embeddings(pixels_BCHW)[:, 1:]
        if isinstance(backbone, CLIPVisionModel):
            return backbone.encoder.layers, backbone.pre_layrnorm(tokens_BND)
        return backbone.layers if isinstance(backbone, ViTModel) else backbone.encoder.layer, tokens_BND

    def _init_weights(self, module: nn.Module) -> None:
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
