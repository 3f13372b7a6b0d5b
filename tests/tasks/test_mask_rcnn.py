"""A Mask R-CNN loses what torchvision's functions say, on any number of ranks, and finds boxes in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectors import BACKBONES, batch_of, scene, small_backbone, small_detector, small_spec
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.roi_heads import fastrcnn_loss

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.config import BackboneConfig
from m3i_scale.errors import ConfigError
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.tasks.detection.detection_losses import (
    Objects,
    choose_regions,
    masks_in,
    match_anchors,
    region_losses,
)
from m3i_scale.tasks.detection.mask_rcnn import MaskRcnnDetector
from m3i_scale.tasks.detection.modeling_mask_rcnn import anchors, cut_out, propose

FULL = [scene(seed) for seed in range(3)]
EMPTY = scene(9, objects=0)
PLAIN_FPN = {"norm": "none", "box_convs": 0, "box_linears": 2, "regions": {"convs": 1, "per_image": 32}}
"""Heads as they were before ViTDet, and as InternImage's detectors have them."""
LVIS = {"classifier": "sigmoid", "federated_classes": 3, "score_above": 0.02, "detections": 300}


def lost(detector: MaskRcnnDetector, backbone: Backbone, scenes: Sequence[Any], seed: int = 0) -> dict[str, Tensor]:
    images, objects = batch_of(list(scenes), seed)
    return detector.losses(detector.encode(backbone, images), objects)


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": parameter.grad
        for number, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def test_losses_are_those_of_torchvision_at_its_beta() -> None:
    spec, backbone = small_spec(smooth_l1_beta=1 / 9), small_backbone(noise=0.02)
    detector = small_detector(spec, backbone, noise=0.02)
    images, objects = batch_of(FULL)
    levels = detector.encode(backbone, images)
    found = detector.losses(levels, objects)

    logits, deltas = detector.regions(levels)
    sides = [(level.shape[2], level.shape[3]) for level in levels]
    places = anchors(spec.regions, sides, detector.strides, images)
    generators = objects.generators()
    boxes = [objects.on(image)[0] for image in range(3)]
    region_losses(spec, torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(places), boxes, generators)
    proposals = propose(spec.regions, logits, deltas, places, [(64.0, 64.0)] * 3, training=True)
    chosen = [
        choose_regions(spec.regions, proposals[image], objects.on(image), 3, generators[image]) for image in range(3)
    ]
    maps = levels[:4]
    class_logits, moves = detector.boxes(cut_out(spec, maps, detector.strides, [c.boxes_R4 for c in chosen], 7))
    labels = torch.cat([c.labels_R for c in chosen])
    ground_first = torch.cat([class_logits[:, 3:], class_logits[:, :3]], dim=1)
    class_moves = torch.cat([torch.zeros_like(moves[:, :1]), moves], dim=1).flatten(1)
    right = [encoded(c.truth_P4, c.boxes_R4[: len(c.objects_P)], len(c.boxes_R4)) for c in chosen]
    expected = fastrcnn_loss(ground_first, class_moves, [(labels + 1) % 4], right)
    torch.testing.assert_close([found["class"], found["box"]], list(expected))

    shown = [c.boxes_R4[: len(c.objects_P)] for c in chosen]
    objects_of = torch.cat([c.labels_R[: len(c.objects_P)] for c in chosen])
    mask_logits = detector.masks(cut_out(spec, maps, detector.strides, shown, 14), objects_of)
    truth = [masks_in(c.masks_PMM, c.truth_P4, boxes, 28) for c, boxes in zip(chosen, shown, strict=True)]
    assert len(mask_logits) >= 9  # three objects an image, and proposals like them
    torch.testing.assert_close(found["mask"], F.binary_cross_entropy_with_logits(mask_logits, torch.cat(truth)))


def encoded(truth: Tensor, boxes: Tensor, count: int) -> Tensor:
    """Moves that are right, in the box head's scale; rows of the ground are not read."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    own_width, own_height = (truth[:, 2:] - truth[:, :2]).unbind(1)
    shift = (truth[:, :2] + truth[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2
    moves = torch.stack(
        [
            10 * shift[:, 0] / width,
            10 * shift[:, 1] / height,
            5 * (own_width / width).log(),
            5 * (own_height / height).log(),
        ],
        dim=1,
    )
    return F.pad(moves, (0, 0, 0, count - len(moves)))


def test_the_rpn_loses_by_as_many_anchors_as_are_asked_for() -> None:
    """Also where there are fewer of them: sums are divided by their number, as detectron2 does."""
    spec = small_spec(regions={"anchors_per_image": 1000, "sizes": [8, 16, 32, 48, 64]})
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(40, 2, generator=generator).mul(50)
    places = torch.cat([places, places + 14], dim=1)
    logits, deltas = torch.randn(1, 40, generator=generator), torch.randn(1, 40, 4, generator=generator)
    _, objects = batch_of(FULL[:1])
    state, truth = match_anchors(spec.regions, places, objects.on(0)[0])
    objectness, moves = region_losses(spec, logits, deltas, places, [objects.on(0)[0]], objects.generators())
    counted = state >= 0
    bce = F.binary_cross_entropy_with_logits(logits[0, counted], state[counted].float(), reduction="sum")
    torch.testing.assert_close(objectness, bce / 1000)
    right, own = state == 1, places[state == 1]
    target = encoded(truth[right], own, len(own)) / torch.tensor([10, 10, 5, 5])
    torch.testing.assert_close(moves, (deltas[0, right] - target).abs().sum() / 1000)


@pytest.mark.parametrize("name", ["vit", "internimage"])
@pytest.mark.parametrize(
    "fields", [{}, LVIS, {"masks": False}, {"class_agnostic_boxes": True, "class_agnostic_masks": True}, PLAIN_FPN]
)
def test_every_parameter_has_a_gradient_whatever_is_on_the_images(name: str, fields: dict[str, Any]) -> None:
    counts = [5, 9, 2] if "federated_classes" in fields else None
    names = []
    for scenes in ([EMPTY, EMPTY], [EMPTY, FULL[0]], FULL[:2]):
        backbone = small_backbone(name)
        detector = small_detector(small_spec(name, **fields), backbone, image_counts=counts)
        losses = lost(detector, backbone, scenes)
        assert set(losses) == {"rpn_objectness", "rpn_box", "class", "box"} | ({"mask"} if detector.masks else set())
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        assert bool(losses["box"] > 0) is not (scenes[1] is EMPTY)
        torch.stack(list(losses.values())).sum().backward()
        found = gradients(detector, backbone)
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert {f"0.{parameter}" for parameter, _ in detector.named_parameters()} <= set(found)
        names.append(set(found))
    assert names[0] == names[1] == names[2]


def test_a_batch_without_a_single_region_is_finite() -> None:
    """No proposal has an area on images of nothing but padding."""
    backbone = small_backbone()
    detector = small_detector(backbone=backbone)
    images, objects = batch_of([EMPTY])
    objects = replace(objects, sizes_B2=torch.zeros(1, 2))
    losses = detector.losses(detector.encode(backbone, images), objects)
    assert [losses[name].item() for name in ("class", "box", "mask")] == [0, 0, 0]
    torch.stack(list(losses.values())).sum().backward()
    assert {f"0.{name}" for name, _ in detector.named_parameters()} <= set(gradients(detector))


def test_an_object_without_an_area_is_none() -> None:
    backbone = small_backbone(noise=0.02)
    detector = small_detector(backbone=backbone, noise=0.02)
    images, objects = batch_of([scene(2, objects=2), scene(3)])
    flat = torch.tensor([[5.0, 5, 5, 20]]).expand(2, 1, 4)
    masks = torch.ones(2, 1, 112, 112, dtype=torch.uint8)
    assert objects.masks_BNMM is not None
    more = replace(
        objects,
        boxes_BN4=torch.cat([flat, objects.boxes_BN4], dim=1),
        labels_BN=torch.cat([torch.ones(2, 1, dtype=torch.int64), objects.labels_BN], dim=1),
        masks_BNMM=torch.cat([masks, objects.masks_BNMM], dim=1),
    )
    with torch.no_grad():
        levels = detector.encode(backbone, images)
        torch.testing.assert_close(detector.losses(levels, more), detector.losses(levels, objects))


def test_an_image_on_which_nothing_is_found_has_no_detections() -> None:
    backbone = small_backbone().eval()
    detector = small_detector(small_spec(score_above=0.99), backbone).eval()
    images, objects = batch_of(FULL[:2])
    with torch.no_grad():
        found = detector.detect(detector.encode(backbone, images), objects.sizes_B2, objects.sizes_B2)
    assert [(len(one.boxes_N4), len(one.scores_N), len(one.masks_NMM)) for one in found] == [(0, 0, 0)] * 2


class OneOfTwo(SingleProcess):
    """A rank of two, which is told what both together have."""

    world_size = 2

    def __init__(self) -> None:
        self.asked: list[Tensor] = []
        self.answers: list[Tensor] = []

    def sum(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach())
        return self.answers.pop(0) if self.answers else x.detach()


@pytest.mark.parametrize("fields", [{}, LVIS])
def test_one_rank_computes_what_two_do(fields: dict[str, Any]) -> None:
    """With unequal numbers of regions and objects on the two: none on one of them."""
    counts = [5, 9, 2] if fields else None
    scenes = [FULL[0], FULL[1], EMPTY, scene(4, objects=1)]
    images, objects = batch_of(scenes)

    def part(rows: slice, ranks: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        backbone = small_backbone(noise=0.02)
        detector = small_detector(small_spec(**fields), backbone, ranks=ranks, image_counts=counts, noise=0.02)
        values = {name: None if value is None else value[rows] for name, value in vars(objects).items()}
        losses = detector.losses(detector.encode(backbone, images[rows]), Objects(**values))
        torch.stack(list(losses.values())).sum().backward()
        return losses, gradients(detector, backbone)

    whole, whole_gradients = part(slice(0, 4), SingleProcess())
    ranks = (OneOfTwo(), OneOfTwo())
    halves = (slice(0, 2), slice(2, 4))
    for rank, rows in zip(ranks, halves, strict=True):
        part(rows, rank)
    assert len(ranks[0].asked) == len(ranks[1].asked)
    together = [first + second for first, second in zip(ranks[0].asked, ranks[1].asked, strict=True)]
    assert not torch.equal(ranks[0].asked[0], ranks[1].asked[0])
    for rank in ranks:
        rank.answers = list(together)
    parts = [part(rows, rank) for rank, rows in zip(ranks, halves, strict=True)]
    for name, loss in whole.items():
        torch.testing.assert_close((parts[0][0][name] + parts[1][0][name]) / 2, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in whole_gradients.items():
        mean = (parts[0][1][name] + parts[1][1][name]) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-3, atol=1e-5)


def test_chance_is_that_of_the_sample() -> None:
    backbone = small_backbone(noise=0.02)
    detector = small_detector(small_spec(regions={"anchors_per_image": 16, "per_image": 8}), backbone, noise=0.02)
    with torch.no_grad():
        first, again, other = (lost(detector, backbone, FULL, seed) for seed in (0, 0, 50))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["class"], other["class"])


class Watch(TorchDispatchMode):
    """Types of what goes into the operations of boxes."""

    NAMES = ("nms", "roi_align", "binary_cross_entropy_with_logits", "_log_softmax", "smooth_l1_loss", "exp", "sigmoid")

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            found = {x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()}
            self.seen.setdefault(name, set()).update(found)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["vit", "internimage"])
def test_boxes_and_losses_of_a_bf16_model_are_fp32(name: str) -> None:
    backbone = small_backbone(name)
    detector = small_detector(small_spec(name, score_above=0.0), backbone)
    exact = {key: value.item() for key, value in lost(detector, backbone, FULL).items()}
    backbone.bfloat16()
    detector.bfloat16()
    images, objects = batch_of(FULL)
    with Watch() as watch:
        levels = detector.encode(backbone, images)
        losses = detector.losses(levels, objects)
        found = detector.eval().detect(levels, objects.sizes_B2, objects.sizes_B2)
    assert {level.dtype for level in levels} == {torch.bfloat16}
    assert watch.seen.keys() >= {"nms", "roi_align", "binary_cross_entropy_with_logits", "_log_softmax", "exp"}
    assert {name: types for name, types in watch.seen.items() if types != {torch.float32}} == {}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(exact, rel=0.1, abs=0.01)
    assert found[0].boxes_N4.dtype == found[0].scores_N.dtype == torch.float32
    torch.stack(list(losses.values())).sum().backward()
    assert {p.grad.dtype for p in detector.parameters() if p.grad is not None} == {torch.bfloat16}


def test_anchors_are_exact_in_a_bf16_model() -> None:
    """In bf16 places near 1,000 pixels are 4 apart."""
    places = anchors(small_spec().regions, [(256, 256)] * 5, [4.0] * 5, torch.zeros(1, dtype=torch.bfloat16))
    assert places[0].dtype == torch.float32
    centers = (places[0][:, :2] + places[0][:, 2:]) / 2
    assert centers[-1].tolist() == [1020, 1020]


def test_detections_are_at_the_size_of_the_image_itself() -> None:
    backbone = small_backbone(noise=0.02).eval()
    detector = small_detector(small_spec(score_above=0.0, detections=7), backbone, noise=0.02).eval()
    images, _ = batch_of(FULL)
    sizes = torch.tensor([[64.0, 64.0], [64.0, 40.0], [32.0, 64.0]])
    own = torch.tensor([[128.0, 128.0], [64.0, 40.0], [96.0, 192.0]])
    with torch.no_grad():
        levels = detector.encode(backbone, images)
        found = detector.detect(levels, sizes, own)
        there = detector.detect(levels, sizes, sizes)
        alone = detector.detect([level[1:2] for level in levels], sizes[1:2], own[1:2])
    for one, inside, (height, width), factor in zip(found, there, own.tolist(), (2, 1, 3), strict=True):
        assert 0 < len(one.boxes_N4) <= 7
        assert one.boxes_N4.min() >= 0
        assert one.boxes_N4[:, 2].max() <= width
        assert one.boxes_N4[:, 3].max() <= height
        assert one.scores_N.tolist() == sorted(one.scores_N.tolist(), reverse=True)
        assert set(one.labels_N.tolist()) <= {0, 1, 2}
        torch.testing.assert_close(one.boxes_N4, inside.boxes_N4 * factor)
        assert one.masks_NMM is not None
        assert one.masks_NMM.shape == (len(one.boxes_N4), 28, 28)
        assert 0 <= one.masks_NMM.min() <= one.masks_NMM.max() <= 1
    torch.testing.assert_close(alone[0].boxes_N4, found[1].boxes_N4, atol=1e-3, rtol=1e-4)


def test_a_sigmoid_gives_a_region_several_classes() -> None:
    backbone = small_backbone().eval()
    detector = small_detector(small_spec(**LVIS), backbone, image_counts=[1, 2, 3]).eval()
    images, objects = batch_of(FULL[:1])
    with torch.no_grad():
        (found,) = detector.detect(detector.encode(backbone, images), objects.sizes_B2, objects.sizes_B2)
    torch.testing.assert_close(found.scores_N, torch.full_like(found.scores_N, 0.5), atol=0.1, rtol=0)
    assert found.labels_N.bincount().min() > 5


def test_boxes_alone_are_learnt_and_found_without_masks() -> None:
    backbone = small_backbone()
    detector = small_detector(small_spec(masks=False, score_above=0.0), backbone)
    images, objects = batch_of(FULL)
    levels = detector.encode(backbone, images)
    assert "mask" not in detector.losses(levels, replace(objects, masks_BNMM=None))
    assert detector.detect(levels, objects.sizes_B2, objects.sizes_B2)[0].masks_NMM is None


@pytest.mark.parametrize("name", ["vit", "internimage"])
def test_its_work_can_be_counted_without_values(name: str) -> None:
    section = BackboneConfig.model_validate(BACKBONES[name])
    with torch.device("meta"):
        backbone = build_backbone(backbone_config(section))
        detector = MaskRcnnDetector(small_spec(name), backbone, 3, SingleProcess())
        images, boxes = torch.zeros(2, 3, 64, 64), torch.zeros(2, 4, 4)
        masks, labels = torch.zeros(2, 4, 112, 112, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.int64)
        objects = Objects(boxes, labels, masks, torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))
        losses = detector.losses(detector.encode(backbone, images), objects)
        torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())


@pytest.mark.parametrize("counts", [[1, 2], [0, 2, 3]])
def test_classes_that_cannot_be_drawn_are_refused(counts: list[int]) -> None:
    with pytest.raises(ConfigError) as raised:
        small_detector(small_spec(**LVIS), image_counts=counts)
    assert "federated_classes" in str(raised.value)


def test_there_are_no_windows_by_default_where_an_image_is_small() -> None:
    detector = small_detector(small_spec(windows=None))
    assert detector.windows is not None
    assert {layer.window for layer in detector.windows.layers} == {detector.windows.layers[0].side}
    with pytest.raises(ConfigError) as raised:
        small_detector(small_spec(windows={"size": 14}))
    assert "task.head.windows.size" in str(raised.value)


def test_what_would_train_nothing_is_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        small_detector(small_spec(windows={"size": 2, "global_layers": list(range(len(small_backbone().layers)))}))
    assert "global_layers" in str(raised.value)
    with pytest.raises(ValidationError):
        small_spec(regions={"per_image": 2})


def test_windows_of_an_internimage_are_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        small_detector(small_spec(), small_backbone("internimage"))
    assert "windows" in str(raised.value)
