"""Whole recipes on backbones with registers and rotary positions: what learns, and what does not."""

from __future__ import annotations

import pytest
import torch
from tiny import DINOV2, DINOV3, REGISTERS, random_batch, tiny_objective

from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import ema_pairs
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.tasks.detection.detection_heads import MaskRcnn, RfDetr
from m3i_scale.tasks.detection.mask_rcnn import MaskRcnnDetector
from m3i_scale.tasks.detection.rfdetr import RfDetrDetector

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
    online = {key for key, _ in ema_pairs(objective)}
    assert MASK_TOKEN not in online
    assert "student.model.embeddings.register_tokens" in online


@torch.no_grad()
def test_nothing_is_drawn_in_training() -> None:
    objective = tiny_objective("m3i", *DINOV3).train()
    images = torch.randn(2, 3, 32, 32)
    for encode in (objective.momentum.backbone, objective.student):
        first, second = (encode.encode_whole(images)[1] for _ in range(2))
        assert torch.equal(first, second)


def test_registers_begin_and_stay_apart() -> None:
    objective = tiny_objective("m3i", *REGISTERS).train()
    registers = objective.student.model.embeddings.register_tokens
    optimizer = torch.optim.SGD([registers], lr=1.0)
    for _ in range(2):
        assert registers[0].std(dim=0).min() > 0
        objective(random_batch(8))[0].backward()
        optimizer.step()
        optimizer.zero_grad()


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
