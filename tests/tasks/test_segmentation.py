"""A segmenter computes what published ones do, and its batch norm and loss are those of all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import first_weights, random_batch
from torch import Tensor, nn
from transformers import UperNetForSemanticSegmentation

from m3i_scale.backbones.base import Backbone
from m3i_scale.config import BackboneConfig, RunConfig
from m3i_scale.data.batch import Batch
from m3i_scale.defaults import NO_CLASS
from m3i_scale.engine.activations import apply_activation_checkpointing
from m3i_scale.errors import ConfigError
from m3i_scale.exports.source import Source
from m3i_scale.exports.tensors import value_of
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective
from m3i_scale.objective.ranks import Ranks, SingleProcess
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.tasks.segmentation.pixel_heads import MapBatchNorm, PixelHead, mean_iou, overlaps
from m3i_scale.tasks.segmentation.segmentation_heads import SegmentationHead, UperNetSegmentation
from m3i_scale.tasks.segmentation.segmentation_task import Segmentation

CLASSES = ["sky", "sea", "sand", "stone", "ship"]
SHAPE = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {"preset": "vit-ti/16", "config": SHAPE | {"intermediate_size": 96}},
    "dinov2": {"preset": "dinov2-s/14", "config": SHAPE | {"mlp_ratio": 2}},
    "clip": {"preset": "clip-b/16", "config": SHAPE | {"intermediate_size": 128}},
    "internimage": {
        "preset": "internimage-t",
        "config": {"image_size": 64, "channels": 16, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8]},
    },
}
UPERNET = {"kind": "upernet", "channels": 32, "dropout": 0.0}
LINEAR = {"kind": "linear", "dropout": 0.0}


def run_of(backbone: str, head: Any) -> RunConfig:
    task = {"kind": "segmentation", "head": head}
    return RunConfig.model_validate({"task": task, "backbone": BACKBONES[backbone]})


def objective_of(backbone: str, head: Any) -> Objective:
    """With layer scales, running statistics and biases that are not those of the start."""
    objective = build_objective(run_of(backbone, head), {"scenes": CLASSES}, None)
    first_weights(objective, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in objective.state_dict().items():
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator))
            elif "classifier" in name:
                tensor.mul_(30)  # logits that differ
    return objective


def batch_of(size: int, side: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, len(CLASSES), (size, side, side), generator=generator, dtype=torch.uint8)
    masks[:, : side // 4] = NO_CLASS
    return replace(random_batch(size, views=1, image=side), masks_BHW=masks)


# ---------------------------------------------------------------- run files


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ({"head": {"kind": "linear", "channels": 64}}, "channels"),
        ({"head": {"kind": "upernet", "out_layers": [4, 2, 6, 8]}}, "out_layers"),
        ({"head": {"kind": "upernet", "out_layers": [4, 4, 6, 8]}}, "out_layers"),
        ({"head": {"kind": "upernet", "out_layers": [0, 2, 6, 8]}}, "out_layers"),
        ({"head": "mask2former"}, "head"),
        ({"ema": 0.99}, "ema"),
    ],
)
def test_what_a_segmenter_cannot_be_is_refused(task: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        RunConfig.model_validate({"task": {"kind": "segmentation", **task}})


def test_layers_that_a_backbone_does_not_have_are_refused() -> None:
    for backbone, layers in (("vit", [1, 2, 3, 7]), ("internimage", [1, 2, 3, 4])):
        with pytest.raises(ConfigError) as caught:
            objective_of(backbone, UPERNET | {"out_layers": layers})
        assert caught.value.where == "task.head.out_layers"
    shallow = BACKBONES["vit"]["config"] | {"num_hidden_layers": 3}
    run = run_of("vit", UPERNET).model_copy(update={"backbone": BackboneConfig(config=shallow)})
    with pytest.raises(ConfigError) as caught:
        build_objective(run, {"scenes": CLASSES}, None)
    assert "task.head" in str(caught.value.where)


class MiddleHead(SegmentationHead):
    """Of a user: reads one layer."""

    module: ClassVar[str] = "test_segmentation.MiddlePixels"
    layer: int = 2


class MiddlePixels(PixelHead):
    """Classifies the map of that layer."""

    def __init__(self, spec: MiddleHead, backbone: Backbone, classes: int, ranks: Ranks) -> None:
        super().__init__()
        self.layers = (spec.layer,)
        self.classifier = nn.Conv2d(backbone.width, classes, 1)

    def forward(self, map_BDHW: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.classifier(maps[0])]


class NoHead(SegmentationHead):
    """Of a user who has forgotten the module."""


class AlienHead(SegmentationHead):
    """Of a user whose module is none that predicts pixels."""

    module: ClassVar[str] = "torch.nn.Identity"


class OldHead(SegmentationHead):
    """Of a user whose module overrides the former name of `encode_view`."""

    module: ClassVar[str] = "test_segmentation.OldPixels"


class OldPixels(MiddlePixels):
    """Would be trained on maps of the default `encode_view`."""

    def encode(self, backbone: Backbone, images_BCHW: Tensor, progress: float) -> tuple[Any, list[Tensor]]:
        return backbone.encode_maps(images_BCHW, (1,))


class UnfinishedHead(SegmentationHead):
    """Of a user whose module predicts nothing."""

    module: ClassVar[str] = "test_segmentation.UnfinishedPixels"


class UnfinishedPixels(PixelHead):
    """Without `forward`."""


class WideHead(UperNetSegmentation):
    """Of a user: UPerNet by another name."""


def test_a_head_may_be_a_class_of_ones_own() -> None:
    objective = build_objective(
        run_of("vit", {"kind": "test_segmentation.MiddleHead", "layer": 4}), {"a": CLASSES}, None
    )
    first_weights(objective, seed=0)
    objective(batch_of(2, 32))[0].backward()
    learns = {layer for layer, module in enumerate(objective.student.layers, start=1) if has_gradient(module)}
    assert learns == {1, 2, 3, 4}


@pytest.mark.parametrize("head", ["NoHead", "AlienHead", "UnfinishedHead", "OldHead"])
def test_a_head_without_a_complete_module_is_an_error(head: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_objective(run_of("vit", f"test_segmentation.{head}"), {"a": CLASSES}, None)
    assert caught.value.where == "task.head"


def test_what_is_made_of_upernet_needs_two_samples_too() -> None:
    for head, needs in ((UPERNET, True), ("test_segmentation.WideHead", True), (LINEAR, False)):
        assert bool(parse_recipe(run_of("vit", head).recipe).compares_samples) is needs


def has_gradient(module: nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": [{"name": "image", "view": 1, "mask": {"ratio": 0.5}}]},
        {"decoders": {"patches": {"kind": "transformer"}}},
    ],
)
def test_a_recipe_that_hides_what_is_segmented_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_recipe(run_of("vit", LINEAR).recipe | changes)


@pytest.mark.parametrize(
    ("preset", "layers"), [("vit-b/16", (4, 6, 8, 12)), ("vit-l/16", (8, 12, 16, 24)), ("vit-h/14", (11, 16, 21, 32))]
)
def test_the_layers_that_are_read_are_those_of_published_configurations(preset: str, layers: tuple[int, ...]) -> None:
    run = RunConfig.model_validate({"task": {"kind": "segmentation"}, "backbone": {"preset": preset}})
    with torch.device("meta"):
        objective = build_objective(run, {"scenes": CLASSES}, None)
    assert objective.heads["segmentation"].layers == layers


# ---------------------------------------------------------------- batch norm


class OneOfTwo:
    """Stands for a rank of two, given what the other adds to every sum."""

    rank, world_size = 0, 2

    def __init__(self, of_other: list[Tensor]) -> None:
        self._of_other = iter(of_other)

    def sum_with_gradient(self, x: Tensor) -> Tensor:
        return x + next(self._of_other)


def test_batch_norm_is_torchs_in_training_and_evaluation() -> None:
    torch.manual_seed(0)
    ours, theirs = MapBatchNorm(6, SingleProcess()), nn.BatchNorm2d(6)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.uniform_(0.5, 2.0))
        ours.bias.copy_(theirs.bias.uniform_(-1.0, 1.0))
    for _ in range(3):
        maps = torch.randn(4, 6, 5, 3) * 3 + 2
        inputs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
        outputs = ours(inputs[0]), theirs(inputs[1])
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.pow(3).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(maps), theirs.eval()(maps))


def test_batch_norm_computes_and_remembers_in_fp32_under_bf16() -> None:
    torch.manual_seed(0)
    norm = MapBatchNorm(4, SingleProcess()).bfloat16()
    maps = (torch.randn(8, 4, 6, 6) * 0.1 + 40).bfloat16()
    output = norm(maps)
    assert (norm.weight.dtype, norm.running_var.dtype, output.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    wanted = nn.BatchNorm2d(4)(maps.float())
    torch.testing.assert_close(output.float(), wanted.bfloat16().float(), rtol=1e-2, atol=1e-2)


def test_batch_norm_takes_the_statistics_of_all_ranks_and_gives_them_their_gradients() -> None:
    torch.manual_seed(0)
    maps = (torch.randn(5, 3, 2, 2) * 2 + 1)[:4].requires_grad_()
    factors = torch.randn(4, 3, 2, 2)  # without them the gradient of what is normalized would be 0
    whole = MapBatchNorm(3, SingleProcess())
    output = whole(maps)
    (wanted,) = torch.autograd.grad((output * factors).sum(), maps)
    mean = maps.mean(dim=(0, 2, 3), keepdim=True)
    losses = []
    for own, other in ((maps[:2], maps[2:]), (maps[2:], maps[:2])):
        of_other = [other.sum(dim=(0, 2, 3)), (other - mean).square().sum(dim=(0, 2, 3))]
        half = MapBatchNorm(3, OneOfTwo(of_other))  # type: ignore[arg-type]
        rows = slice(2 * len(losses), 2 * len(losses) + 2)
        normalized = half(own)
        torch.testing.assert_close(normalized, output[rows])
        torch.testing.assert_close(half.running_var, whole.running_var)
        losses.append((normalized * factors[rows]).sum())
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), maps)
    torch.testing.assert_close(gradient, wanted)
    assert wanted.abs().max() > 0.1


# ---------------------------------------------------------------- UPerNet as published


def stock(objective: Objective, backbone: str, head: Any) -> UperNetForSemanticSegmentation:
    """`transformers`' model with the same weights."""
    run = run_of(backbone, head)
    source = Source(Path("no checkpoint"), run, parse_recipe(run.recipe), 0, {"label_sets": {"scenes": CLASSES}}, [])
    part = source.recipe.targets[0].export(source)
    weights = objective.state_dict()
    values = {name: value_of(made, weights, torch.float32) for name, made in part.tensors.items()}
    model = UperNetForSemanticSegmentation(part.model.config)
    model.load_state_dict(values)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backbone", ["vit", "dinov2"])
@pytest.mark.parametrize("head", [UPERNET, UPERNET | {"out_layers": [1, 2, 5, 6], "auxiliary_weight": 0.7}])
def test_upernet_is_that_of_transformers_in_logits_and_loss(
    backbone: str, head: dict[str, Any], *, training: bool
) -> None:
    objective = objective_of(backbone, head).train(training)
    theirs = stock(objective, backbone, head).train(training)
    batch = batch_of(3, 32)
    pixels = objective.pixel_norm(batch.images_VBCHW[0])
    output = theirs(pixels, labels=batch.masks_BHW.long())
    loss, figures = objective(batch)
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    assert figures["segmentation/count"] == 3
    if training:
        return
    with torch.no_grad():
        (_, tokens), maps = objective.student.encode_maps(pixels, objective.heads["segmentation"].layers)
        logits, auxiliary = objective.heads["segmentation"](tokens, maps)
    assert auxiliary.shape == (3, len(CLASSES), 4, 4)
    resized = nn.functional.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
    assert output.logits.std() > 0.1
    torch.testing.assert_close(resized, output.logits, rtol=1e-4, atol=1e-4)


def test_without_an_auxiliary_head_the_loss_is_the_cross_entropy() -> None:
    objective = objective_of("vit", UPERNET | {"auxiliary_weight": 0.0})
    loss, figures = objective(batch_of(2, 32))
    assert not any("auxiliary" in name for name, _ in objective.named_parameters())
    assert figures["segmentation/nats"].item() == pytest.approx(np.log(len(CLASSES)) - loss.item(), abs=1e-5)


@pytest.mark.parametrize("head", [UPERNET, LINEAR, UPERNET | {"dropout": 0.3}])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_is_segmented_and_learns(backbone: str, head: dict[str, Any]) -> None:
    objective = objective_of(backbone, head)
    batch = batch_of(2, objective.student.image_size)
    loss, _ = objective(batch)
    loss.backward()
    idle = {name for name, parameter in objective.named_parameters() if parameter.grad is None}
    # Maps of layers do not go through the last norm, nor those of stages through what joins them.
    unread = ("student.model.layernorm.", "student.model.post_layernorm.", "student.mask_token.", "student.model.dcnv3")
    assert all(name.startswith(unread) for name in idle)
    objective.eval()(batch)
    assert objective.outputs["segmentation"]["overlaps_3K"].shape == (3, len(CLASSES))


@pytest.mark.parametrize("backbone", ["dinov2", "internimage"])
@pytest.mark.parametrize("head", [UPERNET, LINEAR])
def test_layers_that_recompute_give_the_same_maps_and_gradients(backbone: str, head: dict[str, Any]) -> None:
    kept, recomputing = objective_of(backbone, head), objective_of(backbone, head)
    assert apply_activation_checkpointing(recomputing, "full")
    batch = batch_of(2, kept.student.image_size)
    for objective in (kept, recomputing):
        objective(batch)[0].backward()
    others = dict(recomputing.named_parameters())
    for name, parameter in kept.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(others[name].grad, parameter.grad)


@pytest.mark.parametrize("head", [UPERNET, LINEAR])
def test_of_a_frozen_backbone_the_head_alone_learns(head: dict[str, Any]) -> None:
    run = run_of("vit", head)
    frozen = run.model_copy(update={"task": Segmentation.model_validate({"head": head, "freeze": True})})
    objective = build_objective(frozen, {"scenes": CLASSES}, None)
    first_weights(objective, seed=0)
    objective.train()(batch_of(2, 32))[0].backward()
    learns = {name.partition(".")[0] for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert learns == {"heads"}


# ---------------------------------------------------------------- the linear head


def test_the_linear_head_is_batch_norm_and_a_classifier_of_patches() -> None:
    objective = objective_of("dinov2", LINEAR)
    batch = batch_of(3, 32)
    loss, _ = objective(batch)
    head = objective.heads["segmentation"]
    pixels = objective.pixel_norm(batch.images_VBCHW[0])
    tokens = objective.student.model(pixels).last_hidden_state[:, 1:]
    norm, convolution = nn.BatchNorm2d(64), nn.Conv2d(64, len(CLASSES), 1)
    for own, other in ((head.norm, norm), (head.classifier, convolution)):
        other.weight.data, other.bias.data = own.weight.data, own.bias.data
    logits = convolution(norm(tokens.transpose(1, 2).reshape(3, 64, 4, 4)))
    logits = nn.functional.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
    wanted = nn.functional.cross_entropy(logits, batch.masks_BHW.long(), ignore_index=NO_CLASS)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_pixels_without_a_class_count_for_nothing() -> None:
    objective = objective_of("vit", LINEAR).eval()
    batch = batch_of(2, 32)
    nothing = replace(batch, masks_BHW=torch.full_like(batch.masks_BHW, NO_CLASS))
    loss, figures = objective(nothing)
    assert loss.item() == 0.0
    assert figures["segmentation/count"] == 0
    assert objective.outputs["segmentation"]["overlaps_3K"].sum() == 0
    one = nothing.masks_BHW.clone()
    one[1, 20, 20] = 2
    loss, figures = objective(replace(batch, masks_BHW=one))
    assert loss.item() > 0
    assert figures["segmentation/count"] == 1


# ---------------------------------------------------------------- mIoU


def test_miou_is_that_of_a_confusion_matrix() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 5, 8, 8, generator=generator)
    truth = torch.randint(0, 4, (3, 8, 8), generator=generator)  # nothing is of class 4, which is predicted: 0
    valid = torch.rand(3, 8, 8, generator=generator) < 0.8
    predicted = logits.argmax(1)
    scores = []
    for label in range(5):
        of_truth, of_prediction = (truth == label) & valid, (predicted == label) & valid
        scores.append(float((of_truth & of_prediction).sum() / (of_truth | of_prediction).sum()))
    assert scores[4] == 0
    assert mean_iou(overlaps(predicted, truth, valid, 6)) == pytest.approx(np.mean(scores))  # the sixth is nowhere
    parts = sum(overlaps(predicted[k : k + 1], truth[k : k + 1], valid[k : k + 1], 6) for k in range(3))
    assert mean_iou(parts) == pytest.approx(np.mean(scores))
    assert mean_iou(overlaps(truth, truth, valid, 5)) == 1.0
