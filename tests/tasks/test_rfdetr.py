"""RF-DETR round a backbone of one's own computes what the stock model does: features, predictions and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectors import FOUR_SCENES, SIDE, batch_of, scene, shake, small_backbone
from pydantic import ValidationError
from test_detector_memorises import ap50
from torch import Tensor
from torchvision.ops import clip_boxes_to_image
from transformers import RfDetrDinov2Backbone, RfDetrDinov2Config, RfDetrImageProcessor

from m3i_scale.backbones.base import Backbone
from m3i_scale.backbones.tokens import TokenBackbone
from m3i_scale.engine.partition import initialize_sharded
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import initialize_module
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.tasks.detection.detection_heads import RfDetr
from m3i_scale.tasks.detection.modeling_mask_rcnn import paste_masks
from m3i_scale.tasks.detection.rfdetr import RfDetrDetector, encode_in_windows, masks_in_boxes
from m3i_scale.tasks.detection.rfdetr_queries import stock_class, stock_config

STEPS = 120
SMALL: dict[str, Any] = {
    "channels": 32,
    "queries": 8,
    "groups": 3,
    "decoder_layers": 2,
    "self_attention_heads": 2,
    "cross_attention_heads": 4,
    "decoder_width": 64,
}
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "layer_norm_eps", "image_size")
SHAPE = (*SHAPE, "patch_size", "use_swiglu_ffn", "use_mask_token")


def small(backbone: Backbone | None = None, noise: float = 0.0, **fields: Any) -> RfDetrDetector:
    spec = RfDetr.model_validate(SMALL | fields)
    detector = RfDetrDetector(spec, backbone or small_backbone("dinov2"), 3, SingleProcess())
    initialize_sharded(detector, initialize_module, seed=1)
    shake(detector, noise)
    return detector


def stock_backbone(backbone: Backbone, windows: int, layers: tuple[int, ...]) -> RfDetrDinov2Config:
    config = backbone.model.config
    shape = {key: getattr(config, key) for key in SHAPE}
    return RfDetrDinov2Config(**shape, num_windows=windows, out_indices=list(layers))


def stock(detector: RfDetrDetector, backbone: Backbone) -> Any:
    """The model of `transformers` with the same weights, by name."""
    spec = detector.spec
    shape = stock_backbone(backbone, spec.windows, detector.layers)
    model = stock_class(spec)(stock_config(spec, shape, 3))
    before = ("model.model." if spec.masks else "model.") + "backbone.backbone."
    of_backbone = {before + name: value for name, value in backbone.model.state_dict().items()}
    model.load_state_dict(of_backbone | detector.queries.model.state_dict())
    return model


def labels_of(scenes: list[tuple[Tensor, Tensor, Tensor, Tensor]], *, masks: bool) -> list[dict[str, Tensor]]:
    """What the stock model is told of images."""
    told = []
    for _, boxes, labels, masks_NHW in scenes:
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        target = {"class_labels": labels, "boxes": torch.cat([centers, boxes[:, 2:] - boxes[:, :2]], dim=1) / SIDE}
        told.append(target | ({"masks": masks_NHW} if masks else {}))
    return told


@pytest.mark.parametrize(("windows", "layers"), [(1, (1, 2, 4)), (2, (1, 2, 3, 4)), (4, (2, 4))])
@pytest.mark.parametrize("name", ["dinov2", "gated"])
def test_features_are_those_of_the_stock_backbone(name: str, windows: int, layers: tuple[int, ...]) -> None:
    """Layer scales are not 1 here."""
    backbone = small_backbone(name, noise=0.2).eval()
    theirs = RfDetrDinov2Backbone(stock_backbone(backbone, windows, layers)).eval()
    theirs.load_state_dict(backbone.model.state_dict())
    images, _ = batch_of(FOUR_SCENES)
    assert isinstance(backbone, TokenBackbone)
    with torch.no_grad():
        ours, wanted = encode_in_windows(backbone, images, windows, layers), theirs(images).feature_maps
    assert len(ours) == len(wanted) == len(layers)
    for one, two in zip(ours, wanted, strict=True):
        assert two.std() > 0.1
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6 * float(two.abs().max()))


@pytest.mark.parametrize("masks", [False, True])
def test_predictions_loss_and_gradients_are_those_of_the_stock_model(masks: bool) -> None:
    """With masks of one image: here their points are drawn for it alone. The stock loss is one of training: outside of
    that it takes the queries for several groups."""
    backbone = small_backbone("dinov2", noise=0.1)
    detector = small(backbone, noise=0.05, masks=masks)
    theirs = stock(detector, backbone).train()
    scenes = FOUR_SCENES[:1] if masks else FOUR_SCENES[:3]
    images, objects = batch_of(scenes, seed=5)
    losses = detector.train().losses(detector.encode(backbone.train(), images), objects)
    assert set(losses) == {"class", "box", "giou"} | ({"mask", "dice"} if masks else set())
    torch.manual_seed(5)
    wanted = theirs(images, labels=labels_of(scenes, masks=masks)).loss
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    total.backward()
    wanted.backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in detector.queries.model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        levels, wanted = detector.eval().encode(backbone.eval(), images), theirs.eval()(images)
        for name, value in detector.predict(levels)[0].items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5)


def test_what_is_found_is_what_the_stock_processor_makes_of_it() -> None:
    backbone = small_backbone("dinov2", noise=0.1).eval()
    detector = small(backbone, noise=0.1, detections=9).eval()
    images, objects = batch_of(FOUR_SCENES[:2])
    own_B2 = torch.tensor([[400.0, 900.0], [1280.0, 640.0]])
    with torch.no_grad():
        output = stock(detector, backbone).eval()(images)
        lowest = output.logits.sigmoid().flatten(1).topk(9).values.mean().item()
        detector.spec = detector.spec.model_copy(update={"score_above": lowest})
        found = detector.detect(detector.encode(backbone, images), objects.sizes_B2, own_B2)
    boxes = RfDetrImageProcessor().post_process_object_detection(output, lowest, own_B2, top_k=9)
    masks = RfDetrImageProcessor().post_process_instance_segmentation(
        output, lowest, target_sizes=own_B2.int().tolist(), return_binary_maps=True, top_k=9
    )
    for one, wanted, segments, own in zip(found, boxes, masks, own_B2.int().tolist(), strict=True):
        clipped = clip_boxes_to_image(wanted["boxes"], (own[0], own[1]))
        there = (clipped[:, 2:] > clipped[:, :2]).all(dim=1)
        assert len(one.scores_N) == int(there.sum())
        torch.testing.assert_close(one.boxes_N4, clipped[there], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(one.scores_N, wanted["scores"][there])
        assert one.labels_N.tolist() == wanted["labels"][there].tolist()
        assert one.masks_NMM is not None
        pasted = paste_masks(one.masks_NMM, one.boxes_N4, (own[0], own[1]))
        inside = paste_masks(torch.ones_like(one.masks_NMM), one.boxes_N4, (own[0], own[1]))
        assert segments["segmentation"].shape[0] == len(there)
        assert int(inside.sum()) > 100
        assert (pasted == segments["segmentation"][there])[inside].float().mean() > 0.9
    assert 0 < sum(len(one.scores_N) for one in found) < 18


def test_masks_are_cut_out_where_boxes_are() -> None:
    logits = torch.arange(32.0).expand(1, 32, 32)  # rising from left to right, by one a cell
    cut = masks_in_boxes(logits - 16, torch.tensor([[0.25, 0.5, 0.75, 0.625]]))[0].logit()
    torch.testing.assert_close(cut, cut[:1].expand_as(cut))
    steps = 8 + 16 * (torch.arange(112) + 0.5) / 112 - 0.5 - 16
    torch.testing.assert_close(cut[0], steps, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("logit", [-120.0, 30.0])
def test_queries_that_are_sure_and_wrong_have_a_finite_loss(logit: float) -> None:
    backbone = small_backbone("vit").train()
    detector = small(backbone).train()
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if "class_embed" in name and name.endswith("bias"):
                parameter.fill_(logit)
    images, objects = batch_of(FOUR_SCENES[:1])
    assert detector.losses(detector.encode(backbone, images), objects)["class"].isfinite()


def test_every_parameter_learns_and_chance_is_that_of_the_samples() -> None:
    backbone = small_backbone("vit").train()
    detector = small(backbone).train()
    for scenes in (FOUR_SCENES[2:], FOUR_SCENES):
        images, objects = batch_of(scenes)
        losses = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.random.get_rng_state()
            losses.append(detector.losses(detector.encode(backbone, images), objects))
            assert torch.equal(torch.random.get_rng_state(), before)
        assert all(torch.equal(loss, losses[1][name]) for name, loss in losses[0].items())
        for module in (backbone, detector):
            module.zero_grad()
        torch.stack(list(losses[0].values())).sum().backward()
        parameters = [*backbone.named_parameters(), *detector.named_parameters()]
        assert [name for name, parameter in parameters if parameter.grad is None] == []
    assert losses[0]["box"] > 0 < losses[0]["mask"]


def test_outside_of_training_there_is_one_group() -> None:
    backbone = small_backbone("vit").eval()
    detector = small(backbone)
    images, objects = batch_of(FOUR_SCENES)
    map_BCHW = detector.encode(backbone, images)
    assert [len(detector.train(train).predict(map_BCHW)[0]["logits"][0]) for train in (True, False)] == [24, 8]
    assert all(loss.isfinite() for loss in detector.losses(map_BCHW, objects).values())


def test_boxes_and_losses_are_fp32_in_a_bf16_engine() -> None:
    """Where parameters are bf16, what they give is that of their values in fp32."""
    backbone = small_backbone("vit").eval()
    detector = small(backbone, noise=0.1).eval().bfloat16()
    _, objects = batch_of(FOUR_SCENES[:2])
    map_BCHW = [torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))]
    found = detector.predict(map_BCHW)[0]
    losses = detector.losses(map_BCHW, objects)
    whole = detector.float()
    for name, value in whole.predict(map_BCHW)[0].items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses, whole.losses(map_BCHW, objects))


def test_predictions_that_are_no_numbers_give_such_a_loss() -> None:
    backbone = small_backbone("vit").train()
    detector = small(backbone).train()
    images, objects = batch_of(FOUR_SCENES)
    map_BCHW = detector.encode(backbone, images)[0] * float("nan")
    assert all(loss.isnan() for loss in detector.losses([map_BCHW], objects).values())


def test_it_starts_from_boxes_where_patches_are_and_rare_classes() -> None:
    detector = small()
    names = dict(detector.queries.model.named_parameters())
    assert names["model.model.reference_point_embed.weight"].abs().max() == 0
    assert names["model.bbox_embed.layers.2.weight"].abs().max() == 0
    assert names["model.class_embed.bias"].sigmoid().tolist() == pytest.approx([0.01] * 3)
    rays = names["model.model.decoder.layers.0.cross_attn.sampling_offsets.bias"].view(4, 2, 2)
    wanted = [[[1, 0], [2, 0]], [[0, 1], [0, 2]], [[-1, 0], [-2, 0]], [[0, -1], [0, -2]]]
    torch.testing.assert_close(rays, torch.tensor(wanted, dtype=torch.float32))


@pytest.mark.bench
def test_eight_scenes_are_learnt_by_heart() -> None:
    torch.manual_seed(0)
    scenes = [scene(seed, objects=2 + seed % 3) for seed in range(8)]
    backbone = small_backbone("dinov2").train()
    detector = small(backbone, channels=64, queries=16, groups=4, windows=1).train()
    parameters = [*backbone.parameters(), *detector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=200, pct_start=0.1)  # not to its end
    for step in range(STEPS):
        images, objects = batch_of(scenes, seed=8 * step)
        losses = detector.losses(detector.encode(backbone, images), objects)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        levels = detector.eval().encode(backbone.eval(), images)
        found = detector.detect(levels, objects.sizes_B2, objects.sizes_B2)
    assert min(ap50(found, scenes)) > 0.9


@pytest.mark.parametrize(
    ("name", "fields", "where"),
    [
        ("clip", {}, "task.head.kind: rfdetr"),
        ("internimage", {}, "task.head.kind: rfdetr"),
        ("vit", {"windows": 3}, "task.head.windows: 3"),
        ("vit", {"queries": 65}, "task.head.queries: 65"),
        ("vit", {"out_layers": (1, 3)}, "task.head.out_layers"),
        ("vit", {"out_layers": (1, 5)}, "task.head.out_layers"),
    ],
)
def test_what_it_cannot_be_is_refused(name: str, fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small(small_backbone(name), **fields)
    assert caught.value.where == where


@pytest.mark.parametrize(
    "fields",
    [
        {"out_layers": (3, 1)},
        {"out_layers": (0, 4)},
        {"self_attention_heads": 3},
        {"cross_attention_heads": 5},
        {"class_weight": 0, "box_weight": 0, "giou_weight": 0},
        {"masks": False, "dice_weight": 2},
        {"masks": False, "mask_stride": 2},
        {"masks": True, "queries": 3},
    ],
)
def test_fields_that_do_not_act_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RfDetr.model_validate(SMALL | fields)
