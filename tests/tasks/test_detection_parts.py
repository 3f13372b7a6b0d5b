"""Pyramid, anchors, regions, masks and federated classes are detectron2's, worked out here by plain operations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectors import cropped, scene, shake, small_spec
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import roi_align

from m3i_scale.tasks.detection.detection_heads import MaskRcnn, Regions
from m3i_scale.tasks.detection.detection_losses import (
    choose_regions,
    class_weights,
    draw,
    federated_classes,
    masks_in,
    match_anchors,
    sigmoid_loss,
)
from m3i_scale.tasks.detection.mask_rcnn import StagePyramid
from m3i_scale.tasks.detection.modeling_mask_rcnn import (
    SimplePyramid,
    anchors,
    choose,
    cut_out,
    paste_masks,
    propose,
    scaled,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return weight[:, None, None] * (x - mean) / torch.sqrt(variance + 1e-6) + bias[:, None, None]


def test_the_simple_pyramid_is_that_of_detectron2() -> None:
    pyramid = SimplePyramid(16, 12, norm=True)
    shake(pyramid, 0.3)
    x, names = noise(2, 16, 6, 6), dict(pyramid.named_parameters())

    def at(level: int, place: int, name: str) -> Tensor:
        return names[f"levels.{level}.{place}.{name}"]

    def ends(x: Tensor, level: int, place: int) -> Tensor:
        x = F.conv2d(x, at(level, place, "weight"))
        x = channel_norm(x, at(level, place + 1, "weight"), at(level, place + 1, "bias"))
        x = F.conv2d(x, at(level, place + 2, "weight"), padding=1)
        return channel_norm(x, at(level, place + 3, "weight"), at(level, place + 3, "bias"))

    up = F.conv_transpose2d(x, at(0, 0, "weight"), at(0, 0, "bias"), stride=2)
    up = F.gelu(channel_norm(up, at(0, 1, "weight"), at(0, 1, "bias")))
    four = F.conv_transpose2d(up, at(0, 3, "weight"), at(0, 3, "bias"), stride=2)
    two = F.conv_transpose2d(x, at(1, 0, "weight"), at(1, 0, "bias"), stride=2)
    expected = [ends(four, 0, 4), ends(two, 1, 1), ends(x, 2, 0), ends(F.max_pool2d(x, 2), 3, 1)]
    expected.append(F.max_pool2d(expected[-1], kernel_size=1, stride=2))
    found = pyramid([x])
    assert [tuple(level.shape) for level in found] == [(2, 12, side, side) for side in (24, 12, 6, 3, 2)]
    torch.testing.assert_close(found, expected)
    assert len(names) == 2 * 4 + 4 * 6  # convolutions have no bias before a norm


def test_a_pyramid_without_norms_has_biases() -> None:
    names = [name for name, _ in SimplePyramid(16, 12, norm=False).named_parameters()]
    assert "levels.2.0.bias" in names
    assert "levels.2.1.bias" in names


def test_stages_are_joined_from_the_smallest_up() -> None:
    pyramid = StagePyramid([4, 8, 16, 32], 12, norm=False)
    shake(pyramid, 0.3)
    maps = [noise(1, width, side, side) for width, side in ((4, 16), (8, 8), (16, 4), (32, 2))]
    network, lateral = pyramid.network, []
    for map_BCHW, block in zip(maps, network.inner_blocks, strict=True):
        lateral.append(F.conv2d(map_BCHW, block[0].weight, block[0].bias))
    for number in (2, 1, 0):
        lateral[number] = lateral[number] + F.interpolate(lateral[number + 1], scale_factor=2, mode="nearest")
    expected = [
        F.conv2d(x, block[0].weight, block[0].bias, padding=1)
        for x, block in zip(lateral, network.layer_blocks, strict=True)
    ]
    found = pyramid(maps)
    torch.testing.assert_close(found, [*expected, expected[-1][:, :, ::2, ::2]])


def test_anchors_are_those_of_detectron2() -> None:
    """Not rounded, as torchvision's are; the first one lies round the corner of the image."""
    found = anchors(Regions(sizes=(32, 64, 128, 256, 512)), [(2, 3)] * 5, [4, 8, 16, 32, 64], torch.zeros(1))
    for level, (size, stride) in enumerate(zip((32, 64, 128, 256, 512), (4, 8, 16, 32, 64), strict=True)):
        expected = []
        for y in range(2):
            for x in range(3):
                for ratio in (0.5, 1.0, 2.0):
                    width = math.sqrt(size**2 / ratio)
                    height = ratio * width
                    centre_x, centre_y = x * stride, y * stride
                    half = (width / 2, height / 2)
                    expected.append([centre_x - half[0], centre_y - half[1], centre_x + half[0], centre_y + half[1]])
        torch.testing.assert_close(found[level], torch.tensor(expected))


@pytest.mark.parametrize("stride", [4, 2])
def test_anchors_are_eight_strides_wide_whatever_the_image(stride: int) -> None:
    """By default, as detectron2's of 1,024 pixels are, so that two of a level overlap by seven eighths."""
    strides = [stride * 2**level for level in range(5)]
    for side in (1024, 64):
        found = anchors(Regions(ratios=(1.0,)), [(side // stride,) * 2] * 5, strides, torch.zeros(1))
        assert [(level[0, 2] - level[0, 0]).item() for level in found] == [8 * stride for stride in strides]


def test_an_anchor_is_an_object_by_its_overlap_or_as_the_best_of_its_object() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 120]])
    places = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 5], [50, 50, 60, 60], [100, 100, 110, 104], [0, 0, 10, 2]])
    state, truth = match_anchors(Regions(), places, boxes)
    assert state.tolist() == [1, -1, 0, 1, 0]  # the fourth overlaps by 0.2, more than all others
    assert truth[[0, 3]].tolist() == boxes.tolist()
    state, _ = match_anchors(Regions(), places, boxes[:0])
    assert state.tolist() == [0] * 5


def test_positives_are_drawn_up_to_their_share_and_ground_fills_the_rest() -> None:
    positive = torch.arange(100) < 30
    generator = torch.Generator().manual_seed(0)
    objects, ground = draw(positive, ~positive, 40, 0.5, generator)
    assert (len(objects), len(ground)) == (20, 20)
    assert positive[objects].all()
    assert not positive[ground].any()
    objects, ground = draw(positive, ~positive, 80, 0.5, generator)
    assert (len(objects), len(ground)) == (30, 50)
    assert len(set(objects.tolist())) == 30
    first, again = (draw(positive, ~positive, 40, 0.5, torch.Generator().manual_seed(7))[0] for _ in range(2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != draw(positive, ~positive, 40, 0.5, torch.Generator().manual_seed(8))[0].tolist()


def test_proposals_are_cut_at_the_image_and_thinned_level_by_level() -> None:
    regions = Regions.model_validate({"before_nms": [3, 2], "after_nms": [4, 4]})
    level = torch.tensor([[0.0, 0, 20, 20], [1, 1, 21, 21], [40, 40, 60, 90], [200, 200, 210, 210]])
    logits = [torch.tensor([[4.0, 3, 2, 5]]), torch.tensor([[1.0, 0.5, 0, -1]])]
    deltas = [torch.zeros(1, 4, 4)] * 2
    (found,) = propose(regions, logits, deltas, [level, level], [(50, 64)], training=True)
    # The first level loses the one outside of the image; the second of both levels overlaps the first.
    assert found.tolist() == [[0, 0, 20, 20], [0, 0, 20, 20], [40, 40, 60, 50]]
    (found,) = propose(regions, logits, deltas, [level, level], [(50, 64)], training=False)
    assert found.tolist() == [[0, 0, 20, 20], [0, 0, 20, 20]]


def test_a_proposal_that_is_not_finite_is_left_out() -> None:
    logits, deltas = [torch.tensor([[4.0, float("nan")]])], [torch.zeros(1, 2, 4)]
    (found,) = propose(Regions(), logits, deltas, [torch.tensor([[0.0, 0, 9, 9]] * 2)], [(64, 64)], training=True)
    assert found.tolist() == [[0, 0, 9, 9]]


def test_regions_are_cut_out_of_the_level_of_their_size() -> None:
    """The third level has what is as large as an image of 224 pixels, and every doubling is a level."""
    spec = small_spec()
    levels = [noise(2, 4, side, side, seed=side) for side in (128, 64, 32, 16)]
    strides = [4.0, 8.0, 16.0, 32.0]
    boxes = [
        torch.tensor([[10.0, 10, 60, 70], [0, 0, 112, 112], [0, 0, 111, 112]]),
        torch.tensor([[5.0, 9, 300, 240], [0, 0, 480, 500]]),
    ]
    expected = []
    for image, level, box in ((0, 0, 0), (0, 1, 1), (0, 0, 2), (1, 2, 0), (1, 3, 1)):
        cut = [boxes[image][box : box + 1]]
        expected.append(roi_align(levels[level][image : image + 1], cut, 7, 1 / strides[level], 0, aligned=True))
    torch.testing.assert_close(cut_out(spec, levels, strides, boxes, 7), torch.cat(expected))


def test_boxes_are_scaled_by_rows_and_by_columns_and_end_at_the_edge() -> None:
    boxes = torch.tensor([[8.0, 6, 16, 12], [30, 10, 80, 24], [32, 0, 40, 12]])
    found, there = scaled(boxes, (24.0, 32.0), (48, 96))  # twice as high, three times as wide
    assert found.tolist() == [[24, 12, 48, 24], [90, 20, 96, 48], [96, 0, 96, 24]]
    assert there.tolist() == [True, True, False]


def test_levels_are_told_by_their_strides() -> None:
    """Of patches of 8 pixels the fourth level has the stride of what is as large as an image of 224 pixels."""
    levels, strides = [noise(1, 4, side, side, seed=side) for side in (128, 64, 32, 16)], [2.0, 4.0, 8.0, 16.0]
    for side, level in ((224.0, 3), (112.0, 2), (64.0, 1), (20.0, 0)):
        box = [torch.tensor([[0.0, 0, side, side]])]
        wanted = roi_align(levels[level], box, 7, 1 / strides[level], 0, aligned=True)
        torch.testing.assert_close(cut_out(small_spec(), levels, strides, box, 7), wanted)


def test_a_region_is_the_object_that_it_overlaps_by_half() -> None:
    boxes, labels = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]]), torch.tensor([2, 0])
    proposals = torch.tensor([[0.0, 0, 10, 6], [0, 0, 10, 4], [21, 20, 40, 40], [50, 50, 60, 60]])
    chosen = choose_regions(
        Regions.model_validate({"per_image": 16}), proposals, (boxes, labels, None), 3, torch.Generator().manual_seed(0)
    )
    found = {tuple(box): label for box, label in zip(chosen.boxes_R4.tolist(), chosen.labels_R.tolist(), strict=True)}
    # 16 regions of which a quarter are objects: all four of them, the objects' own boxes among them.
    assert found == {
        (0, 0, 10, 6): 2,
        (21, 20, 40, 40): 0,
        (0, 0, 10, 10): 2,
        (20, 20, 40, 40): 0,
        (0, 0, 10, 4): 3,
        (50, 50, 60, 60): 3,
    }
    assert boxes[chosen.objects_P].tolist() == chosen.truth_P4.tolist()


# torchvision's targets are half a pixel off (`aligned=False`), which is more than one of 28 places in 20 pixels.
@pytest.mark.parametrize(("times", "off"), [(1, 0.08), (4, 0.025)])
def test_masks_kept_in_boxes_give_what_full_masks_do(times: int, off: float) -> None:
    """On 112 places a box. Less than 1 % of the targets' pixels are others than those of full masks."""
    disagree: dict[str, list[Tensor]] = {"aligned": [], "torchvision": []}
    for seed in range(6):
        _, boxes, _, masks = scene(seed)
        masks, boxes = masks.repeat_interleave(times, 1).repeat_interleave(times, 2), boxes * times
        shifts = torch.rand(boxes.shape, generator=torch.Generator().manual_seed(seed))
        regions = boxes + times * (4 * shifts - 2)
        numbers = torch.arange(len(boxes))
        rois = torch.cat([numbers[:, None], regions], dim=1)
        full = {
            "torchvision": project_masks_on_boxes(masks.float(), regions, numbers, 28),
            "aligned": roi_align(masks.float()[:, None], rois, 28, aligned=True)[:, 0],
        }
        found = masks_in(cropped(masks, boxes), boxes, regions, 28)
        for name, soft in full.items():
            disagree[name].append((found != (soft >= 0.5)).float().mean())
    assert torch.stack(disagree["aligned"]).mean() < 0.01
    assert torch.stack(disagree["torchvision"]).mean() < off


def test_a_mask_outside_of_its_box_is_nothing() -> None:
    full = torch.ones(1, 112, 112, dtype=torch.uint8)
    own = torch.tensor([[10.0, 10, 20, 30]])
    found = masks_in(full, own, torch.tensor([[0.0, 10, 20, 30]]), 28)
    assert found[0, :, :13].max() == 0
    assert found[0, :, 15:].min() == 1
    assert masks_in(full, own, own, 28).min() == 1


def test_detections_are_chosen_class_by_class() -> None:
    spec = small_spec(score_above=0.1, detections=3)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [30, 30, 90, 50]])
    scores = torch.tensor([[0.9, 0.3], [0.8, 0.05], [0.2, 0.1]])
    found = choose(spec, scores, boxes[:, None].expand(-1, 2, 4), (64, 64))
    assert found[0].tolist() == [[0, 0, 10, 10], [0, 0, 10, 10], [30, 30, 64, 50]]
    torch.testing.assert_close(found[1], torch.tensor([0.9, 0.3, 0.2]))
    assert found[2].tolist() == [0, 1, 0]
    agnostic = choose(spec, scores, boxes[:, None], (64, 64))
    torch.testing.assert_close(list(agnostic), list(found))
    assert len(choose(small_spec(score_above=0.95), scores, boxes[:, None], (64, 64))[0]) == 0


def test_boxes_are_scaled_to_the_image_itself() -> None:
    boxes = torch.tensor([[10.0, 10, 20, 30], [70, 5, 70, 9]])
    found, there = scaled(boxes, (64.0, 32.0), (128, 320))
    assert found[0].tolist() == [100, 20, 200, 60]
    assert there.tolist() == [True, False]


def test_masks_are_pasted_where_they_were() -> None:
    _, boxes, _, masks = scene(3)
    soft = F.interpolate(cropped(masks, boxes)[:, None].float(), size=(28, 28), mode="area")[:, 0]
    pasted = paste_masks(soft, boxes, (64, 64))
    overlap = (pasted & masks).flatten(1).sum(1) / (pasted | masks).flatten(1).sum(1)
    assert overlap.min() > 0.95
    assert paste_masks(soft[:0], boxes[:0], (64, 48)).shape == (0, 64, 48)


def test_federated_classes_are_those_that_detectron2_draws() -> None:
    """`get_fed_loss_classes` and `get_fed_loss_cls_weights`, whose draws are `multinomial`'s."""
    counts = [100, 1, 0, 25, 4, 9, 16, 400, 1, 36]
    weights = class_weights(counts, 0.5)
    assert weights.tolist() == [10, 1, 0, 5, 2, 3, 4, 20, 1, 6]
    for seed in range(20):
        labels = torch.tensor([7, 10, 10, 3, 7])
        own = torch.unique(labels)
        chances = torch.ones(11)
        chances[-1] = 0
        chances[:10] = torch.tensor(counts).float() ** 0.5
        chances[own] = 0
        drawn = torch.multinomial(chances, 6 - 3, replacement=False, generator=torch.Generator().manual_seed(seed))
        found = federated_classes(labels, 6, weights, torch.Generator().manual_seed(seed))
        assert found.tolist() == [*own.tolist(), *drawn.tolist()]
        assert 2 not in found  # no image has it
    assert federated_classes(torch.arange(8), 6, weights, torch.Generator()).tolist() == list(range(8))


@pytest.mark.parametrize("classes", [None, [1, 4, 3]])
def test_sigmoids_are_compared_as_detectron2_does(classes: list[int] | None) -> None:
    """`sigmoid_cross_entropy_loss`, times its number of regions."""
    logits, labels = noise(5, 5), torch.tensor([4, 1, 0, 4, 1])
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for number, value in enumerate(row[:-1]):
            if classes is None or number in classes:
                chance = 1 / (1 + math.exp(-value))
                expected -= math.log(chance if number == label else 1 - chance)
    found = sigmoid_loss(logits, labels, None if classes is None else torch.tensor(classes))
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"federated_classes": 50}, "federated_classes"),
        ({"masks": False, "mask_side": 7}, "mask_side"),
        ({"federated_power": 1.0}, "federated_power"),
        ({"windows": {"size": 0, "global_layers": [1]}}, "global_layers"),
        ({"windows": {"global_layers": [3, 1]}}, "global_layers"),
        ({"regions": {"negative_iou": 0.8}}, "negative_iou"),
        ({"regions": {"after_nms": [0, 1]}}, "after_nms"),
        ({"box_weights": [0, 1, 1, 1]}, "box_weights"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        MaskRcnn.model_validate(fields)
