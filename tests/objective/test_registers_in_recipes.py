"""Whole recipes on backbones with registers and rotary positions: what learns, and what does not."""

from __future__ import annotations

import pytest
import torch
from tiny import DINOV2, DINOV3, REGISTERS, random_batch, tiny_objective

from m3i_scale.config.detection import MaskRcnn, RfDetr
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import momentum_pairs
from m3i_scale.objective.detection.mask_rcnn import MaskRcnnDetector
from m3i_scale.objective.detection.rfdetr import RfDetrDetector
from m3i_scale.objective.ranks import SingleProcess

FAMILIES = {"registers": REGISTERS, "dinov3": DINOV3}
MASK_TOKEN = "student.model.embeddings.mask_token"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("recipe", ["m3i", "dinov2"])
def test_everything_learns_but_the_mask_token_that_no_input_reads(recipe: str, name: str) -> None:
    objective = tiny_objective(recipe, *FAMILIES[name]).train()
    objective(random_batch(8, views=len(objective.recipe.views or "ab")))[0].backward()
    frozen = {
        key for key, parameter in objective.student.named_parameters(prefix="student") if not parameter.requires_grad
    }
    missing = {key for key, parameter in objective.student.named_parameters(prefix="student") if parameter.grad is None}
    assert frozen == missing == {MASK_TOKEN}
    online = {key for key, _ in momentum_pairs(objective)}
    assert MASK_TOKEN not in online
    assert "student.model.embeddings.register_tokens" in online


def test_the_momentum_target_sees_no_drawn_coordinates() -> None:
    objective = tiny_objective("m3i", *DINOV3, "backbone.config.pos_embed_rescale=2.0").train()
    images = torch.randn(2, 3, 32, 32)
    first, second = (objective.momentum(images)[0][1] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        first, second = (objective.student.encode_whole(images)[1] for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_detectors_that_know_no_registers_are_refused(name: str) -> None:
    student = tiny_objective("supervised", *FAMILIES[name]).student
    with pytest.raises(ConfigError) as caught:
        MaskRcnnDetector(MaskRcnn(), student, 3, SingleProcess())
    assert caught.value.where == "task.head.windows"
    with pytest.raises(ConfigError) as caught:
        RfDetrDetector(RfDetr(queries=4), student, 3, SingleProcess())
    assert caught.value.where == "task.head.kind: rfdetr"
    assert student.prefix == 1 + 4
    assert tiny_objective("supervised", *DINOV2).student.prefix == 1
