"""Mask R-CNN on a plain Transformer, as ViTDet has it (Li et al., ECCV 2022), by parts of torchvision.

Modules compute in their own type. What is predicted, anchors, boxes and RoIAlign are fp32 whatever that is, since a box
in bf16 would be off by pixels.
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
"""Of the levels, in patches of the backbone."""
KERNEL = "vitdet_windows"
"""Name of the attention function among those of `transformers`."""
_ANCHOR_STRIDES = 8
"""Side of the anchors of a level in its strides (`scales` of mmdetection); neighbours overlap, whatever the image."""
_CANONICAL_SIDE, _CANONICAL_STRIDE = 224, 16
"""A region as large as an image of ImageNet is cut out of the level of this stride (FPN, equation 1)."""


class WindowAttention(nn.Module):
    """Lets the tokens of one layer attend within windows, or within the whole image."""

    def __init__(self, side: int, window: int, head_width: int, *, relative: bool) -> None:
        super().__init__()
        self.side, self.window = side, window
        count = 2 * window - 1
        self.rows = nn.Parameter(torch.zeros(count, head_width)) if relative else None
        self.columns = nn.Parameter(torch.zeros(count, head_width)) if relative else None
        """What a query is multiplied with, by distance."""

    def reset_parameters(self) -> None:
        """Start without an effect of distance."""
        for table in (self.rows, self.columns):
            if table is not None:
                nn.init.zeros_(table)

    def forward(self, module: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float) -> Tensor:
        """Return what tokens read: (B, N, heads, D) of queries, keys and values (B, heads, N, D)."""
        query, key, value = (
            self._split(x, getattr(module, name).bias)
            for x, name in ((query, "q_proj"), (key, "k_proj"), (value, "v_proj"))
        )
        mask = self._distances(query)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
        return self._joined(read)

    def _split(self, x_BHND: Tensor, bias: Tensor | None) -> Tensor:
        """Return (windows · B, heads, tokens of a window, D).

        Windows over the edge are filled with what the layer makes of zeros, which tokens attend to: so ViTDet does.
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
        """Return what is added to the products of queries and keys."""
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
    """Attend as a layer of `transformers` asks for it; without windows as SDPA does."""
    if windows is None or scaling is None:
        read, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return read, None
    return windows(module, query, key, value, dropout, scaling), None


AttentionInterface.register(KERNEL, _attend)


class WindowedLayers(nn.Module):
    """Runs the layers of a plain Transformer without its class token, each within its windows. What splits, adds and
    joins is the attention function that the stock layers call, so they have to be built with `KERNEL`."""

    def __init__(self, side: int, windows: Sequence[int], head_width: int, *, relative: bool) -> None:
        super().__init__()
        self.side, self.sides, self.relative = side, list(windows), relative
        self.layers = nn.ModuleList(WindowAttention(side, window, head_width, relative=relative) for window in windows)

    def forward(self, layers: Iterable[nn.Module], tokens_BND: Tensor) -> Tensor:
        """Return the last layer's map before the last norm, (B, D, H, W), of embedded patches (B, H · W, D)."""
        for layer, windows in zip(layers, self.layers, strict=True):
            tokens_BND = layer(tokens_BND, None, windows=windows)
        map_BDHW: Tensor = tokens_BND.transpose(1, 2).unflatten(2, (self.side, self.side))
        return map_BDHW


class MapNorm(nn.Module):
    """Normalises the channels at every place, in fp32."""

    eps = 1e-6

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """Set scale 1 and offset 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the same shape and type."""
        x_BHWC = x_BCHW.permute(0, 2, 3, 1).float()
        normed_BHWC = F.layer_norm(x_BHWC, x_BHWC.shape[-1:], self.weight.float(), self.bias.float(), self.eps)
        return normed_BHWC.permute(0, 3, 1, 2).to(x_BCHW.dtype)


def _norm(channels: int, there: bool) -> list[nn.Module]:
    return [MapNorm(channels)] if there else []


class SimplePyramid(nn.Module):
    """Scales the map of a plain Transformer ×4, ×2, ×1 and ×½, and takes every second place of the last."""

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
        """Return five maps (B, C, H, W), the largest first, of one."""
        (map_BDHW,) = maps
        levels = [level(map_BDHW) for level in self.levels]
        return [*levels, levels[-1][:, :, ::2, ::2]]


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


class _Conv(nn.Conv2d):
    """Convolves 3 × 3 places; all of the RPN starts small, other heads from what keeps gradients behind a ReLU."""

    def __init__(self, channels: int, *, bias: bool = True, small: bool = False) -> None:
        self.small = small
        super().__init__(channels, channels, 3, padding=1, bias=bias)

    def reset_parameters(self) -> None:
        """Draw first values."""
        if self.small:
            nn.init.normal_(self.weight, std=0.01)
        else:
            nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Doubled(nn.ConvTranspose2d):
    """Doubles the side of maps, and starts as the convolutions of heads do."""

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
    """Classifies regions, and moves their boxes."""

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
        """Return logits (R, K + 1), of the ground last, and deltas (R, K or 1, 4)."""
        hidden_RD = self.linears(self.convs(_as(cut_RCSS, self)).flatten(1))
        logits_RK, deltas_RN = (part(hidden_RD[..., None, None]).flatten(1) for part in (self.classes, self.deltas))
        return logits_RK, deltas_RN.unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Predicts the mask in regions, by class."""

    def __init__(self, spec: HeadFields, classes: int) -> None:
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


def _convolutions(spec: HeadFields, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    normed = spec.norm == "layer"
    for _ in range(count):
        layers += [_Conv(spec.channels, bias=not normed), *_norm(spec.channels, normed), nn.ReLU()]
    return nn.Sequential(*layers)


def _as(x: Tensor, module: Any) -> Tensor:
    """Return a tensor in the compute type of a module."""
    return x.to(next(module.parameters()).dtype)


def anchors(
    regions: RegionFields, sides: Sequence[tuple[int, int]], strides: Sequence[float], like: Tensor
) -> list[Tensor]:
    """Return the anchors of every level, (H · W · A, 4), round the upper left corner of every place.

    Args:
        regions: sizes and ratios.
        sides: rows and columns of every level.
        strides: of every level in pixels.
        like: a tensor on the device.
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
    """Return the best regions of every image (R, 4), at most `after_nms`.

    Args:
        regions: how many, and what overlaps.
        logits: by level, whether an anchor is an object (B, N).
        deltas: by level, how it is moved (B, N, 4).
        anchors: by level (N, 4).
        sizes: height and width of every image before padding.
        training: which of the numbers hold.
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
    """Return what lies in regions, each from the level of its size: fp32 (R, C, side, side).

    Every level has part in the result, with a gradient of zero where no region is of its size.

    Args:
        spec: how they are sampled.
        levels: maps (B, C, H, W) in fp32, the largest first.
        strides: in pixels, of them and of what follows.
        boxes: by image (R, 4).
        side: of the result.
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
        spec: lowest score, overlap and number.
        scores_RK: of the regions, by class.
        boxes_RK4: of the regions, by class, or one for all (R, 1, 4).
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
    """Return boxes at an image's own size, clipped, and which of them have an area: (N, 4), bool (N).

    Args:
        boxes_N4: in the batch's image.
        size: height and width there, before padding.
        own: of the image itself.
    """
    by_y, by_x = own[0] / size[0], own[1] / size[1]
    boxes_N4 = clip_boxes_to_image(boxes_N4 * boxes_N4.new_tensor([by_x, by_y, by_x, by_y]), own)
    return boxes_N4, has_area(boxes_N4)


def paste_masks(masks_NMM: Tensor, boxes_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the masks of detections as pixels of the image where they are at least one half: bool (N, H, W).

    Args:
        masks_NMM: soft masks in their boxes.
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
    """Return the numbers of regions of a level; where there are no values, all are of the first one."""
    if mask_R.is_meta:
        return torch.arange(0 if level else len(mask_R), device="meta")
    return mask_R.nonzero()[:, 0]


def has_area(boxes_N4: Tensor) -> Tensor:
    """Return which boxes (…, 4) have an area."""
    return (boxes_N4[..., 2] > boxes_N4[..., 0]) & (boxes_N4[..., 3] > boxes_N4[..., 1])


@dataclass(frozen=True)
class Detections:
    """Holds what was found on one image, the best first."""

    boxes_N4: Tensor
    """float32: x1, y1, x2, y2 at the image's own size."""
    scores_N: Tensor
    labels_N: Tensor
    masks_NMM: Tensor | None
    """Soft masks in the boxes, which `paste_masks` puts into the image; None of a Faster R-CNN."""


class MaskRcnnHead(nn.Module):
    """Finds objects on square images, padded at the right and at the bottom.

    Args:
        head: of the modules, and of what counts as found.
        classes: K.
        patch_size: of the backbone in pixels.
        windows: of a plain Transformer.
        pyramid: makes five levels of the backbone's maps.
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
        """Return what is found on every image.

        Args:
            levels: maps (B, C, H, W) of the pyramid.
            sizes_B2: height and width of the images before padding.
            own_B2: those of the images themselves, which boxes are scaled to.
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
        """Return logits, deltas and anchors by level."""
        sides = [(map_BCHW.shape[2], map_BCHW.shape[3]) for map_BCHW in levels]
        return *self.regions(levels), anchors(self.head.regions, sides, self.strides, levels[0])


def sizes_of(sizes_B2: Tensor) -> list[tuple[float, float]]:
    """Return heights and widths as numbers."""
    return [(float(height), float(width)) for height, width in sizes_B2.tolist()]


@dataclass
class MaskRcnnOutput(ModelOutput):
    """Holds what was found on a batch of images, the best first. Of images with less than others, the last labels are
    −1 and the last scores nought."""

    scores: Tensor | None = None
    """(B, N)."""
    labels: Tensor | None = None
    """(B, N): keys of `config.id2label`."""
    boxes: Tensor | None = None
    """(B, N, 4): x1, y1, x2, y2 in pixels of the image."""
    masks: Tensor | None = None
    """(B, N, M, M): soft masks in the boxes; see `paste_masks`. None where none are trained."""


def joined(found: Sequence[Detections]) -> MaskRcnnOutput:
    """Return what was found on several images in one tensor each."""
    masks = [one.masks_NMM for one in found if one.masks_NMM is not None]
    return MaskRcnnOutput(
        scores=pad_sequence([one.scores_N for one in found], batch_first=True),
        labels=pad_sequence([one.labels_N for one in found], batch_first=True, padding_value=-1),
        boxes=pad_sequence([one.boxes_N4 for one in found], batch_first=True),
        masks=pad_sequence(masks, batch_first=True) if masks else None,
    )


class MaskRcnnForObjectDetection(PreTrainedModel):
    """Finds the objects of images by a ViT, DINOv2 or vision model of CLIP and a Mask R-CNN."""

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
        """Return what is found on images (B, 3, S, S), which show something at their upper left.

        Args:
            pixel_values: normalised; nought beyond the image.
            reshaped_input_sizes: (B, 2), height and width of what they show; None: all of them is shown.
            original_sizes: (B, 2), those of the images themselves, which boxes are for; None: the same.
        """
        if reshaped_input_sizes is None:
            reshaped_input_sizes = torch.tensor([pixel_values.shape[-2:]] * len(pixel_values))
        own_B2 = reshaped_input_sizes if original_sizes is None else original_sizes
        return joined(self.detect(pixel_values, reshaped_input_sizes, own_B2))

    @torch.no_grad()
    def detect(self, pixels_BCHW: Tensor, sizes_B2: Tensor, own_B2: Tensor) -> list[Detections]:
        """Return what is found on every image; arguments as of `forward`."""
        windows = cast(WindowedLayers, self.detector.windows)
        map_BDHW = windows(*self._embedded(pixels_BCHW.to(self.dtype)))
        return self.detector.detect(self.detector.pyramid([map_BDHW]), sizes_B2, own_B2)

    def _embedded(self, pixels_BCHW: Tensor) -> tuple[Iterable[nn.Module], Tensor]:
        """Return the backbone's layers, and patches as the first of them reads them."""
        backbone = self.backbone
        tokens_BND = backbone.embeddings(pixels_BCHW)[:, 1:]
        if isinstance(backbone, CLIPVisionModel):
            return backbone.encoder.layers, backbone.pre_layrnorm(tokens_BND)
        return backbone.layers if isinstance(backbone, ViTModel) else backbone.encoder.layer, tokens_BND

    def _init_weights(self, module: nn.Module) -> None:
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
