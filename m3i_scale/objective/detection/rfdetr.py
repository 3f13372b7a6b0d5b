"""Find objects by queries that a decoder matches with what the image shows: RF-DETR.

Modules, matching and losses are those of `transformers`. It matches and averages over what lies on one rank; here an
image is compared by itself, with chance by its own seed, and losses are divided by the objects of all ranks, so that a
batch is one however it is dealt.
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
from m3i_scale.config.detection import RfDetr
from m3i_scale.defaults import MASK_SIDE
from m3i_scale.errors import ConfigError
from m3i_scale.objective.detection.base import ObjectDetector
from m3i_scale.objective.detection.losses import Objects
from m3i_scale.objective.detection.modeling_mask_rcnn import Detections, paste_masks, scaled
from m3i_scale.objective.detection.queries import Prediction, StockQueries
from m3i_scale.objective.detection.windows import default_global_layers
from m3i_scale.objective.ranks import Ranks

_TERMS = {
    "class": "loss_ce",
    "box": "loss_bbox",
    "giou": "loss_giou",
    "mask": "loss_mask_ce",
    "dice": "loss_mask_dice",
}
"""Terms of the loss, by their stock names."""
_COSTS: dict[str, Any] = {"class_cost": 2, "bbox_cost": 5, "giou_cost": 2}
"""Of a pair of query and object (rfdetr/main.py: set_cost_class, set_cost_bbox, set_cost_giou)."""
_FOCAL_ALPHA = 0.25
"""Share of the score in what a query is to be, beside the overlap (rfdetr/main.py: focal_alpha)."""
_MASK_POINT_RATIO = 16
"""Pixels of a mask for every point that is compared (rfdetr/config.py: mask_point_sample_ratio)."""


class RfDetrDetector(ObjectDetector):
    """Finds objects by queries.

    Backbone and projector compute in the engine's type; queries, decoder, heads, boxes and losses in fp32.

    Args:
        spec: of the run file.
        backbone: f_θ.
        classes: K.
        ranks: losses are divided by what all of them have.

    Raises:
        ConfigError: the parts do not fit together, or no stock RF-DETR holds the backbone.
    """

    def __init__(self, spec: RfDetr, backbone: Backbone, classes: int, ranks: Ranks) -> None:
        super().__init__()
        _check(spec, backbone)
        self.spec, self.ranks, self.side = spec, ranks, backbone.image_size
        self.layers = read_layers(spec, len(backbone.layers))
        self.queries = StockQueries(spec, backbone.width, len(self.layers), classes)

    def read(self, backbone: Backbone, images_BCHW: Tensor) -> list[Tensor]:
        """Return the maps of the layers that are read, through the last norm: (B, D, H, W) each."""
        vision = cast(TokenBackbone, backbone)  # `__init__` has refused others
        return vision.encode_in_windows(images_BCHW, self.spec.windows, self.layers)

    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the map that queries read: one (B, C, H, W)."""
        return [self.queries.project(maps)]

    def losses(self, levels: Sequence[Tensor], objects: Objects) -> dict[str, Tensor]:
        """Return the weighted sums of losses over all predictions: of class, box, giou, mask and dice."""
        predictions = self.predict(levels)
        groups = self.spec.groups if self.training else 1
        there = [objects.on(image) for image in range(len(levels[0]))]
        own = float(groups * sum(len(labels_N) for _, labels_N, _ in there))
        count = torch.full((), own, device=levels[0].device)
        count = (self.ranks.sum(count) / self.ranks.world_size).clamp(min=1 / self.ranks.world_size)
        # Every parameter has a part in it, whether there are objects or not.
        nothing = 0 * torch.stack([part.sum() for prediction in predictions for part in prediction.values()]).sum()
        found = dict.fromkeys(list(_TERMS) if self.spec.masks else list(_TERMS)[:3], nothing)
        if not nothing.is_meta and not nothing.isfinite():
            return found  # boxes that are no numbers cannot be matched; the loss is none either
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
        """Return the best pairs of query and class of every image. A mask ends where its box does."""
        last, spec = self.predict(levels)[0], self.spec
        return decode_queries(last, sizes_B2, own_B2, self.side, score_above=spec.score_above, most=spec.detections)

    def predict(self, levels: Sequence[Tensor]) -> list[Prediction]:
        """Return all predictions of a map, that of the last layer first; fp32 whatever the type of the parameters."""
        (map_BCHW,) = levels
        values = {name: parameter.float() for name, parameter in self.queries.named_parameters()}
        predictions: list[Prediction] = functional_call(self.queries, values, (map_BCHW.float(), self.side))
        return predictions

    def _target(self, boxes_N4: Tensor, labels_N: Tensor, masks_NMM: Tensor | None) -> Prediction:
        """Return the objects of an image as the stock losses take them."""
        target = {"class_labels": labels_N, "boxes": box_convert(boxes_N4, "xyxy", "cxcywh") / self.side}
        if self.spec.masks:
            if masks_NMM is None:
                raise ValueError("queries with masks learn from masks")
            target["masks"] = paste_masks(masks_NMM, boxes_N4, (self.side, self.side)).float()
        return target

    def _compare(self, one: Prediction, target: Prediction, groups: int, count: Tensor) -> dict[str, Tensor]:
        """Return the losses of one prediction of an image.

        Args:
            one: of that image alone.
            target: its objects.
            groups: of queries.
            count: what losses are divided by.
        """
        spec = self.spec
        weights = {"class": spec.class_weight, "box": spec.box_weight, "giou": spec.giou_weight}
        weights |= {"mask": spec.mask_weight, "dice": spec.dice_weight} if spec.masks else {}
        classes = one["logits"].shape[2]
        criterion = RfDetrImageLoss(None, classes, _FOCAL_ALPHA, (), groups, _MASK_POINT_RATIO)
        pairs = [self._match(one, target, groups)]
        losses = {"loss_ce": _class_loss(one, target, pairs[0], count)}
        if one["logits"].is_meta:  # the stock loss of boxes looks at values
            losses |= dict.fromkeys(("loss_bbox", "loss_giou"), one["pred_boxes"][0, pairs[0][0]].sum())
        elif len(target["boxes"]):
            losses |= criterion.loss_boxes(one, [target], pairs, count)
        if len(target["boxes"]):
            losses |= criterion.loss_masks(one, [target], pairs, count) if spec.masks else {}
        return {term: weights[term] * losses[name] for term, name in _TERMS.items() if name in losses}

    def _match(self, one: Prediction, target: Prediction, groups: int) -> tuple[Tensor, Tensor]:
        """Return which query of every group is which object; where there are no values, the first ones."""
        objects = len(target["boxes"])
        if one["logits"].is_meta or not objects:
            number_N = torch.arange(min(objects, self.spec.queries))
            return torch.cat([number_N + group * self.spec.queries for group in range(groups)]), number_N.repeat(groups)
        matcher = LwDetrHungarianMatcher(**_COSTS)
        if self.spec.masks:
            of_masks = {"cost_mask_class_cost": self.spec.mask_weight, "cost_mask_dice_cost": self.spec.dice_weight}
            matcher = RfDetrHungarianMatcher(**_COSTS, **of_masks, mask_point_sample_ratio=_MASK_POINT_RATIO)
        (pair,) = matcher(one, [target], groups)  # on the host, where it is found
        query_N, object_N = torch.stack(pair).to(one["logits"].device, non_blocking=True).unbind()
        return query_N, object_N


def decode_queries(
    prediction: Prediction, sizes_B2: Tensor, own_B2: Tensor, side: int, *, score_above: float, most: int
) -> list[Detections]:
    """Return the best pairs of query and class of every image. A mask ends where its box does.

    Args:
        prediction: of the last layer of the decoder, one group of queries.
        sizes_B2: height and width of the images in the square, in pixels.
        own_B2: those of the images themselves, which boxes are scaled to.
        side: of the square.
        score_above: lowest score.
        most: detections of an image.
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
    """Return the loss of the classes of one image: how sure a query is, and how well its box lies, is what it is to be
    (rfdetr's `loss_labels`; that of `transformers` takes logarithms of probabilities, which large logits make 0)."""
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
    """Return the layers of a backbone that are read, from 1."""
    layers = spec.out_layers or tuple(layer + 1 for layer in default_global_layers(depth))
    if layers[-1] != depth:
        raise ConfigError(
            f"the backbone has {depth} layers, and the last one that is read is {layers[-1]}",
            where="task.head.out_layers",
            why="layers behind it would be trained by nothing",
            fix="task.head.out_layers=null reads the last of every quarter",
        )
    return layers


def masks_in_boxes(logits_NHW: Tensor, boxes_N4: Tensor) -> Tensor:
    """Return what masks are in their boxes: probabilities (N, M, M).

    Args:
        logits_NHW: of the whole square.
        boxes_N4: x1, y1, x2, y2 as shares of it.
    """
    steps_M = (torch.arange(MASK_SIDE, device=boxes_N4.device) + 0.5) / MASK_SIDE
    start_N12, extent_N12 = boxes_N4[:, None, :2], boxes_N4[:, None, 2:] - boxes_N4[:, None, :2]
    places_NM2 = (start_N12 + extent_N12 * steps_M[:, None]) * 2 - 1
    shape = (len(boxes_N4), MASK_SIDE, MASK_SIDE)
    x_NMM, y_NMM = places_NM2[:, None, :, 0].expand(shape), places_NM2[:, :, None, 1].expand(shape)
    places = torch.stack([x_NMM, y_NMM], dim=-1)
    return F.grid_sample(logits_NHW[:, None], places, padding_mode="border", align_corners=False)[:, 0].sigmoid()


def _check(spec: RfDetr, backbone: Backbone) -> None:
    """Refuse a backbone that no stock RF-DETR holds, or that the head does not fit."""
    refused = None
    if not isinstance(backbone, TokenBackbone):
        refused = "it reads layers of one grid, and this backbone has maps of several"
    elif not isinstance(backbone.model.config, ViTConfig | Dinov2Config):
        refused = f"its backbone is a DINOv2, and a {backbone.model.config.model_type} has parts that it has not"
    if refused is not None:
        raise ConfigError(
            f"no RF-DETR holds the backbone: {refused}",
            where="task.head.kind: rfdetr",
            fix="task.head=mask_rcnn, or a ViT or DINOv2",
        )
    side = backbone.grid[0]
    if side % spec.windows:
        raise ConfigError(
            f"{spec.windows} windows do not divide the {side} patches along a side",
            where=f"task.head.windows: {spec.windows}",
            fix=f"another backbone.config.image_size, a multiple of {spec.windows * backbone.patch_size}",
        )
    if spec.queries > side**2:
        raise ConfigError(
            f"{spec.queries} queries start from as many of {side**2} patches",
            where=f"task.head.queries: {spec.queries}",
            fix=f"task.head.queries={side**2}, or a larger backbone.config.image_size",
        )
