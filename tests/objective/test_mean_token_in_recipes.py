"""Whole recipes on a backbone whose mean patch stands for its class token: what begins how, what learns, what not."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import SIGLIP, random_batch, tiny_objective
from transformers import SiglipVisionConfig, SiglipVisionModel

from m3i_scale.config import RunConfig
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective, ema_pairs
from m3i_scale.objective.positions import grid_position
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.tasks.detection.detection_heads import MaskRcnn, RfDetr
from m3i_scale.tasks.detection.mask_rcnn import MaskRcnnDetector
from m3i_scale.tasks.detection.rfdetr import RfDetrDetector

SHAPE = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 512}


@pytest.mark.parametrize("mixed", [(), ("backbone.attention=across_images",)], ids=["own", "mixed"])
def test_everything_learns_and_is_averaged(mixed: tuple[str, ...]) -> None:
    objective = tiny_objective("m3i", *SIGLIP, *mixed).train()
    objective(random_batch(8))[0].backward()
    names = {name for name, _ in objective.student.named_parameters(prefix="student")}
    assert {name for name, one in objective.student.named_parameters(prefix="student") if one.grad is None} == set()
    assert names <= {online for online, _ in ema_pairs(objective)}
    assert not any("head" in name for name in names)


@pytest.mark.parametrize("recipe", ["mae", "siglip"])
def test_recipes_that_read_no_class_token_take_it(recipe: str) -> None:
    objective = tiny_objective(recipe, *SIGLIP).train()
    loss = objective(random_batch(8))[0]
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is not None for p in objective.student.parameters() if p.requires_grad)


@pytest.mark.parametrize("recipe", ["supervised", "dinov2"])
def test_a_decoder_that_reads_the_class_token_is_refused(recipe: str) -> None:
    overrides = ("recipe.decoders.pool.kind=class_token",) if recipe == "supervised" else ()
    with pytest.raises(ConfigError) as caught:
        tiny_objective(recipe, *SIGLIP, *overrides)
    assert caught.value.where == "recipe.decoders"


def test_first_values_are_those_of_the_stock_model_but_for_the_grid_of_positions() -> None:
    run = (f"backbone.config={SHAPE}",)
    model = tiny_objective("m3i", *SIGLIP, *run).student.model
    torch.manual_seed(0)
    stock = SiglipVisionModel(SiglipVisionConfig(**model.config.to_diff_dict()))
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        if ours.ndim > 1 and "position" not in name:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05), name
        elif name.endswith("bias"):
            assert ours.abs().max() < 1e-4
    table, side = model.embeddings.position_embedding.weight, math.isqrt(model.embeddings.num_positions)
    torch.testing.assert_close(table, grid_position((side, side), 256, table.device))


def test_detectors_that_leave_out_a_class_token_are_refused() -> None:
    student = tiny_objective("m3i", *SIGLIP).student
    with pytest.raises(ConfigError) as caught:
        MaskRcnnDetector(MaskRcnn(), student, 3, SingleProcess())
    assert caught.value.where == "task.head.windows"
    with pytest.raises(ConfigError) as caught:
        RfDetrDetector(RfDetr(queries=4), student, 3, SingleProcess())
    assert caught.value.where == "task.head.kind: rfdetr"


@torch.no_grad()
def test_queries_of_masks_are_no_patches() -> None:
    head = {"kind": "eomt", "queries": 7, "blocks": 1, "points": 200}
    shape = SHAPE | {"hidden_size": 64, "num_hidden_layers": 2, "image_size": 64}
    backbone = {"preset": "siglip-b/16", "config": shape}
    run = RunConfig.model_validate({"task": {"kind": "segmentation", "head": head}, "backbone": backbone})
    objective = build_objective(run, {"pixels": ["a", "b"]}, None)
    for parameter in objective.parameters():
        parameter.normal_(std=0.1)
    images = torch.randn(2, 3, 64, 64)
    (mean, tokens), _ = objective.reader.encode_view(objective.student, images, 1.0)
    assert tokens.shape == (2, 16, 64)
    torch.testing.assert_close(mean, tokens.mean(dim=1, keepdim=True))
    assert not torch.allclose(tokens, objective.student.encode_whole(images)[1], atol=1e-4)  # they read the queries
