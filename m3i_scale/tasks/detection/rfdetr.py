"""RF-DETR: object detection with queries.

Modules, matching and losses come from `transformers`, which matches and normalizes within one rank. Here, matching and
random numbers are per image, and losses are normalized by the objects of all ranks. Results do not depend on the
distribution of a batch over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image
from transformers import Dinov2Config, ViTConfig
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher
from transformers.loss.loss_rf_detr import RfDetrHungarianMatcher, RfDetrImageLoss

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.tokens import TokenBackbone
from m3i_scale.defaults import MASK_SIDE
from m3i_scale.errors import ConfigError
from m3i_scale.objective.ranks import Ranks
from m3i_scale.tasks.detection.detection_heads import RfDetr, default_global_layers
from m3i_scale.tasks.detection.detection_losses import Objects
from m3i_scale.tasks.detection.modeling_mask_rcnn import Detections, paste_masks, scaled
from m3i_scale.tasks.detection.object_detector import ObjectDetector
from m3i_scale.tasks.detection.rfdetr_queries import Prediction, StockQueries

_TERMS = {
    "class": "loss_ce",
    "box": "loss_bbox",
    "giou": "loss_giou",
    "mask": "loss_mask_ce",
    "dice": "loss_mask_dice",
}
"""Loss terms by their names in `transformers`."""
_COSTS: dict[str, Any] = {"class_cost": 2, "bbox_cost": 5, "giou_cost": 2}
"""Matching costs of a pair of query and object (rfdetr/main.py: set_cost_class, set_cost_bbox, set_cost_giou)."""
_FOCAL_ALPHA = 0.25
"""Weight of the score in the target of a query; the rest is the overlap (rfdetr/main.py: focal_alpha)."""
_MASK_POINT_RATIO = 16
"""Mask pixels per sampled point (rfdetr/config.py: mask_point_sample_ratio)."""


class RfDetrDetector(ObjectDetector):
    """RF-DETR detection head. The backbone must be one that a stock RF-DETR supports.

    Backbone and projector compute in the engine's dtype; queries, decoder, heads, boxes and losses in fp32. Losses are
    normalized over `ranks`.
    """

    def __init__(self, spec: RfDetr, backbone: Backbone, classes: int, ranks: Ranks) -> None:
        super().__init__()
        _check(spec, backbone)
        self.spec, self.ranks, self.side = spec, ranks, backbone.image_size
        self.layers = read_layers(spec, len(backbone.layers))
        self.queries = StockQueries(spec, backbone.width, len(self.layers), classes)

    def read(self, backbone: Backbone, images_BCHW: Tensor) -> list[Tensor]:
        """Return the maps of the selected layers after the final norm: (B, D, H, W) each."""
        vision = cast(TokenBackbone, backbone)  # `__init__` rejects other backbones
        return encode_in_windows(vision, images_BCHW, self.spec.windows, self.layers)

    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the decoder's input: one map (B, C, H, W)."""
        return [self.queries.project(maps)]

    def losses(self, levels: Sequence[Tensor], objects: Objects) -> dict[str, Tensor]:
        """Return the weighted losses, summed over all predictions: class, box, giou, mask and dice."""
        predictions = self.predict(levels)
        groups = self.spec.groups if self.training else 1
        there = [objects.on(image) for image in range(len(levels[0]))]
        own = float(groups * sum(len(labels_N) for _, labels_N, _ in there))
        count = torch.full((), own, device=levels[0].device)
        count = (self.ranks.sum(count) / self.ranks.world_size).clamp(min=1 / self.ranks.world_size)
        # Every parameter contributes, with or without objects.
        nothing = 0 * torch.stack([part.sum() for prediction in predictions for part in prediction.values()]).sum()
        found = dict.fromkeys(list(_TERMS) if self.spec.masks else list(_TERMS)[:3], nothing)
        if not nothing.is_meta and not nothing.isfinite():
            return found  # non-finite boxes cannot be matched; the loss is not finite either
        parts = [{name: part.split(1) for name, part in prediction.items()} for prediction in predictions]
        devices = [nothing.device] if nothing.is_cuda else []
        with torch.random.fork_rng(devices, enabled=not nothing.is_meta):
            for image in range(len(there)):
                if not nothing.is_meta:
                    torch.manual_seed(int(objects.seeds_B[image]))
                target = self._target(*there[image])
                for by_image in parts:
                    one = {name: images[image] for name, images in by_image.items()}
                    for term, loss in self._compare(one, target, groups, count).items():
                        found[term] = found[term] + loss
        return found

    @torch.no_grad()
    def detect(self, levels: Sequence[Tensor], sizes_B2: Tensor, own_B2: Tensor) -> list[Detections]:
        """Return the top pairs of query and class of every image. Masks are cropped to their boxes."""
        last, spec = self.predict(levels)[0], self.spec
        return decode_queries(last, sizes_B2, own_B2, self.side, score_above=spec.score_above, most=spec.detections)

    def predict(self, levels: Sequence[Tensor]) -> list[Prediction]:
        """Return all predictions of a map, last layer first; fp32 for any dtype of the parameters."""
        (map_BCHW,) = levels
        values = {name: parameter.float() for name, parameter in self.queries.named_parameters()}
        predictions: list[Prediction] = functional_call(self.queries, values, (map_BCHW.float(), self.side))
        return predictions

    def _target(self, boxes_N4: Tensor, labels_N: Tensor, masks_NMM: Tensor | None) -> Prediction:
        """Return the objects of an image in the format of the stock losses."""
        target = {"class_labels": labels_N, "boxes": box_convert(boxes_N4, "xyxy", "cxcywh") / self.side}
        if self.spec.masks:
            if masks_NMM is None:
                raise ValueError("queries with masks learn from masks")
            target["masks"] = paste_masks(masks_NMM, boxes_N4, (self.side, self.side)).float()
        return target

    def _compare(self, one: Prediction, target: Prediction, groups: int, count: Tensor) -> dict[str, Tensor]:
        """Return the losses of one prediction of an image, divided by `count`."""
        spec = self.spec
        weights = {"class": spec.class_weight, "box": spec.box_weight, "giou": spec.giou_weight}
        weights |= {"mask": spec.mask_weight, "dice": spec.dice_weight} if spec.masks else {}
        classes = one["logits"].shape[2]
        criterion = RfDetrImageLoss(None, classes, _FOCAL_ALPHA, (), groups, _MASK_POINT_RATIO)
        pairs = [self._match(one, target, groups)]
        losses = {"loss_ce": _class_loss(one, target, pairs[0], count)}
        if one["logits"].is_meta:  # the stock box loss reads values
            losses |= dict.fromkeys(("loss_bbox", "loss_giou"), one["pred_boxes"][0, pairs[0][0]].sum())
        elif len(target["boxes"]):
            losses |= criterion.loss_boxes(one, [target], pairs, count)
        if len(target["boxes"]):
            losses |= criterion.loss_masks(one, [target], pairs, count) if spec.masks else {}
        return {term: weights[term] * losses[name] for term, name in _TERMS.items() if name in losses}

    def _match(self, one: Prediction, target: Prediction, groups: int) -> tuple[Tensor, Tensor]:
        """Match queries of every group with objects. On meta tensors, the first ones match."""
        objects = len(target["boxes"])
        if one["logits"].is_meta or not objects:
            number_N = torch.arange(min(objects, self.spec.queries))
            return torch.cat([number_N + group * self.spec.queries for group in range(groups)]), number_N.repeat(groups)
        matcher = LwDetrHungarianMatcher(**_COSTS)
        if self.spec.masks:
            of_masks = {"cost_mask_class_cost": self.spec.mask_weight, "cost_mask_dice_cost": self.spec.dice_weight}
            matcher = RfDetrHungarianMatcher(**_COSTS, **of_masks, mask_point_sample_ratio=_MASK_POINT_RATIO)
        (pair,) = matcher(one, [target], groups)  # on the CPU, where it is computed
        query_N, object_N = torch.stack(pair).to(one["logits"].device, non_blocking=True).unbind()
        return query_N, object_N


def encode_in_windows(
    backbone: TokenBackbone, images_BCHW: Tensor, windows: int, layers: Sequence[int]
) -> list[Tensor]:
    """Encode images within `windows` × `windows` windows, each with the prefix.

    Requires added position embeddings; `windows` must divide the grid. Return the maps (B, D, H, W) of `layers`,
    from 1, after the final norm. The layer after each of them attends to all windows and their prefixes.
    """
    prefix_BPD, tokens_BND = backbone.embed(images_BCHW)
    grid, width = backbone.grid_of(images_BCHW), backbone.width
    batch, (rows, columns) = len(tokens_BND), (side // windows for side in grid)
    parted = tokens_BND.unflatten(1, (windows, rows, windows, columns)).transpose(2, 3)
    tokens = torch.cat([prefix_BPD.repeat_interleave(windows**2, dim=0), parted.reshape(-1, rows * columns, width)], 1)
    maps = []
    for number, layer in enumerate(backbone.layers):
        across = tokens.reshape(batch, -1, width) if number in layers else tokens
        tokens = layer(across, None).reshape(tokens.shape)
        if number + 1 in layers:
            _, patches = backbone.read(backbone.normed(tokens))
            read = patches.unflatten(0, (batch, windows, windows)).unflatten(3, (rows, columns))
            maps.append(read.transpose(2, 3).reshape(batch, *grid, width).permute(0, 3, 1, 2))
    return maps


def decode_queries(
    prediction: Prediction, sizes_B2: Tensor, own_B2: Tensor, side: int, *, score_above: float, most: int
) -> list[Detections]:
    """Return the top pairs of query and class of every image. Masks are cropped to their boxes.

    Args:
        prediction: prediction of the last decoder layer, one group of queries.
        sizes_B2: height and width of the images in the square, in pixels.
        own_B2: height and width of the original images, to which boxes are scaled.
        side: size of the square.
    """
    found = []
    sizes, owns = (cast(list[tuple[float, float]], lengths_B2.tolist()) for lengths_B2 in (sizes_B2, own_B2))
    for image, (size, own) in enumerate(zip(sizes, owns, strict=True)):
        scores_QK = prediction["logits"][image].sigmoid()
        scores_N, place_N = scores_QK.flatten().topk(min(most, scores_QK.numel()))
        query_N, labels_N = place_N // scores_QK.shape[1], place_N % scores_QK.shape[1]
        shares_N4 = box_convert(prediction["pred_boxes"][image][query_N], "cxcywh", "xyxy")
        boxes_N4 = clip_boxes_to_image(side * shares_N4, size)
        own_N4, there_N = scaled(boxes_N4, size, own)
        there_N = there_N & (scores_N > score_above)
        masks_NMM = None
        if "pred_masks" in prediction:
            logits_NHW = prediction["pred_masks"][image][query_N[there_N]]
            masks_NMM = masks_in_boxes(logits_NHW, boxes_N4[there_N] / side).half()
        found.append(Detections(own_N4[there_N], scores_N[there_N], labels_N[there_N], masks_NMM))
    return found


def _class_loss(one: Prediction, target: Prediction, pair: tuple[Tensor, Tensor], count: Tensor) -> Tensor:
    """Return the class loss of one image. The target of a query combines its score and the overlap of its box. Follows
    rfdetr's `loss_labels`. The loss of `transformers` takes the log of probabilities, which are 0 for large logits."""
    (query_N, object_N), logits_QK = pair, one["logits"][0]
    labels_N, boxes_N4 = target["class_labels"][object_N], target["boxes"][object_N]
    corners_N4, wanted_N4 = (
        box_convert(x, "cxcywh", "xyxy") for x in (one["pred_boxes"][0, query_N].detach(), boxes_N4)
    )
    overlap_N = box_iou(corners_N4, wanted_N4).diagonal()
    chance_QK = logits_QK.sigmoid()
    quality_N = chance_QK[query_N, labels_N].detach() ** _FOCAL_ALPHA * overlap_N ** (1 - _FOCAL_ALPHA)
    quality_N = quality_N.clamp(min=0.01)
    place = (query_N, labels_N)
    positive_QK = torch.zeros_like(logits_QK).index_put(place, quality_N)
    negative_QK = chance_QK.square().index_put(place, 1 - quality_N)
    return -(positive_QK * F.logsigmoid(logits_QK) + negative_QK * F.logsigmoid(-logits_QK)).sum() / count


def read_layers(spec: RfDetr, depth: int) -> tuple[int, ...]:
    """Return the backbone layers that the head uses, from 1."""
    layers = spec.out_layers or tuple(layer + 1 for layer in default_global_layers(depth))
    if layers[-1] != depth:
        raise ConfigError(
            f"the head must read the last layer of the backbone, {depth}, but the last in task.head.out_layers is "
            f"{layers[-1]}",
            where="task.head.out_layers",
            why="layers after it would not be trained",
            fix="set task.head.out_layers=null, which selects the last layer of every quarter",
        )
    return layers


def masks_in_boxes(logits_NHW: Tensor, boxes_N4: Tensor) -> Tensor:
    """Crop mask logits of the square to boxes (x1, y1, x2, y2 relative to the square): probabilities (N, M, M)."""
    steps_M = (torch.arange(MASK_SIDE, device=boxes_N4.device) + 0.5) / MASK_SIDE
    start_N12, extent_N12 = boxes_N4[:, None, :2], boxes_N4[:, None, 2:] - boxes_N4[:, None, :2]
    places_NM2 = (start_N12 + extent_N12 * steps_M[:, None]) * 2 - 1
    shape = (len(boxes_N4), MASK_SIDE, MASK_SIDE)
    x_NMM, y_NMM = places_NM2[:, None, :, 0].expand(shape), places_NM2[:, :, None, 1].expand(shape)
    places = torch.stack([x_NMM, y_NMM], dim=-1)
    return F.grid_sample(logits_NHW[:, None], places, padding_mode="border", align_corners=False)[:, 0].sigmoid()


def _check(spec: RfDetr, backbone: Backbone) -> None:
    refused = None
    if not isinstance(backbone, TokenBackbone):
        refused = "it reads layers of one grid, and this backbone has maps of several"
    elif not isinstance(backbone.model.config, ViTConfig | Dinov2Config):
        refused = f"its backbone is a DINOv2, and a {backbone.model.config.model_type} has parts that it has not"
    if refused is not None:
        raise ConfigError(
            f"RF-DETR does not support the backbone: {refused}",
            where="task.head.kind: rfdetr",
            fix="set task.head=mask_rcnn, or use a ViT or DINOv2",
        )
    side = backbone.grid[0]
    if side % spec.windows:
        raise ConfigError(
            f"the number of patches per side must be a multiple of {spec.windows} windows, got {side}",
            where=f"task.head.windows: {spec.windows}",
            fix=f"set backbone.config.image_size to a multiple of {spec.windows * backbone.patch_size}",
        )
    if spec.queries > side**2:
        raise ConfigError(
            f"task.head.queries must be at most {side**2}, the number of patches, got {spec.queries}",
            where=f"task.head.queries: {spec.queries}",
            fix=f"set task.head.queries={side**2}, or a larger backbone.config.image_size",
        )
