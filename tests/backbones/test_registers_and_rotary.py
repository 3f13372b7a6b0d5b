"""Registers are in every sequence and in no answer; rotary positions are those of a token's own place and view."""

from __future__ import annotations

import pytest
import torch
from test_backbones import DINOV3, REGISTERS
from torch import nn
from transformers import DINOv3ViTModel
from weights import shaken

from m3i_scale.backbones.base import MaskedPatches, MaskToken
from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.tokens import TokenBackbone
from m3i_scale.config import BackboneConfig
from m3i_scale.evaluation.pictures.model_outputs import encode_attending
from m3i_scale.objective.inputs import PixelNorm
from m3i_scale.objective.teacher import FrozenTeacher
from m3i_scale.tasks.segmentation.mask_queries import encode_beside

SECTIONS = {"registers": REGISTERS, "dinov3": DINOV3}
IMAGES = {
    view: torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(view))
    for view, side in ((1, 32), (2, 32), (3, 16))
}
HALF = torch.stack([torch.arange(0, 16, 2), torch.arange(8)])
"""Of the 16 patches of an image, by image."""


def made(section: BackboneConfig) -> TokenBackbone:
    backbone = build_backbone(backbone_config(section))
    shaken(backbone)
    assert isinstance(backbone, TokenBackbone)
    return backbone


def stock(backbone: TokenBackbone, image_CHW: torch.Tensor, chosen: list[torch.Tensor], others: list = ()) -> list:
    """Tokens of the last stock layer for one row: the prefix of the first image, and patches of each."""
    model, images = backbone.model, [image_CHW, *others]
    sequence, cos, sin = [], [], []
    for number, (image, index) in enumerate(zip(images, chosen, strict=True)):
        embedded = model.embeddings(image[None])
        patches = embedded[:, -((image.shape[-1] // 8) ** 2) :]
        sequence += [embedded[:, : embedded.shape[1] - patches.shape[1]]] if number == 0 else []
        sequence.append(patches[:, index])
        if hasattr(model, "rope_embeddings"):
            turned = model.rope_embeddings(image[None])
            cos.append(turned[0][index])
            sin.append(turned[1][index])
    hidden = torch.cat(sequence, dim=1)
    for layer in backbone.layers:
        hidden = layer(hidden, None, (torch.cat(cos), torch.cat(sin))) if cos else layer(hidden, None)
    normed = (model.norm if cos else model.layernorm)(hidden)
    counts = [len(index) for index in chosen]
    return [normed[:, :1], *normed[:, -sum(counts) :].split(counts, dim=1)]


@pytest.mark.parametrize("name", SECTIONS)
@torch.no_grad()
def test_visible_tokens_are_those_of_stock_layers_over_them_alone(name: str) -> None:
    backbone = made(SECTIONS[name])
    inputs = backbone.encode_own(IMAGES, [1, 3], [HALF, torch.tensor([[0, 3], [1, 2]])])
    for row in range(2):
        for (cls, tokens), view, index in zip(inputs, (1, 3), (HALF[row], [[0, 3], [1, 2]][row]), strict=True):
            wanted = stock(backbone, IMAGES[view][row], [torch.as_tensor(index)])
            torch.testing.assert_close(cls[row : row + 1], wanted[0], rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(tokens[row : row + 1], wanted[1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", SECTIONS)
@torch.no_grad()
def test_a_mix_has_the_prefix_of_its_first_image_and_each_token_the_angles_of_its_own_place(name: str) -> None:
    backbone = made(SECTIONS[name])
    visible, rows = [HALF, 8 + HALF // 2], [torch.tensor([0, 1]), torch.tensor([1, 0])]
    first, second = backbone.encode_mixed(IMAGES, [1, 2], visible, rows)
    for row in range(2):
        other = 1 - row
        chosen = [visible[0][row], visible[1][other]]
        wanted = stock(backbone, IMAGES[1][row], chosen, [IMAGES[2][other]])
        torch.testing.assert_close(first[0][row : row + 1], wanted[0], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(first[1][row : row + 1], wanted[1], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(second[1][row : row + 1], wanted[2], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", SECTIONS)
@torch.no_grad()
def test_attention_maps_and_further_tokens_leave_registers_out(name: str) -> None:
    backbone = made(SECTIONS[name])
    images, model = IMAGES[1], backbone.model
    (cls, tokens), attended = encode_attending(backbone, images)
    model.set_attn_implementation("eager")
    wanted = model(pixel_values=images, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(attended, wanted.attentions[-1][:, :, 0, -16:], rtol=1e-5, atol=1e-6)
    assert (attended.sum(dim=-1) < 1).all()
    last = wanted.last_hidden_state
    torch.testing.assert_close(torch.cat([cls, tokens], dim=1), last[:, [0, *range(-16, 0)]], rtol=1e-5, atol=2e-6)
    _, (first,) = backbone.encode_maps(images, [1])
    torch.testing.assert_close(first.flatten(2).transpose(1, 2), wanted.hidden_states[1][:, -16:], rtol=1e-5, atol=2e-6)
    beside = encode_beside(backbone, images, torch.zeros(2, 0, 64), 1)
    torch.testing.assert_close(beside, last, rtol=1e-5, atol=2e-6)


@torch.no_grad()
def test_frequencies_stay_in_fp32_when_the_model_is_cast() -> None:
    exact, cast = made(DINOV3), made(DINOV3).bfloat16()
    wanted = exact.angles(IMAGES[1])
    found = cast.angles(IMAGES[1].bfloat16())
    assert found[0].dtype == torch.bfloat16
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs.bfloat16())


@torch.no_grad()
def test_frequencies_of_a_frozen_teacher_stay_in_fp32() -> None:
    config = backbone_config(DINOV3)
    teacher = FrozenTeacher(
        "folder", "test", config, PixelNorm((0.5,) * 3, (0.5,) * 3), backbone_config(DINOV3)
    ).bfloat16()
    wanted = DINOv3ViTModel(config).rope_embeddings.inv_freq
    teacher(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert torch.equal(teacher.model.rope_embeddings.inv_freq, wanted)


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("recomputes", [False, True])
def test_every_parameter_learns_but_the_mask_token(name: str, recomputes: bool) -> None:
    backbone = made(SECTIONS[name]).train()
    if recomputes:
        backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cls, tokens = backbone.encode_own(IMAGES, [1], [HALF])[0]
    (cls.square().sum() + tokens.square().sum()).backward()
    missing = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert missing == ["model.embeddings.mask_token"]
    assert not backbone.model.embeddings.mask_token.requires_grad
    if recomputes:
        plain = made(SECTIONS[name]).train()
        cls, tokens = plain.encode_own(IMAGES, [1], [HALF])[0]
        (cls.square().sum() + tokens.square().sum()).backward()
        for ours, theirs in zip(backbone.parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad)


def test_registers_are_no_patches() -> None:
    """Neither do mask tokens take their place, nor has a view of another size more of them."""
    backbone, token = made(REGISTERS), MaskToken(64)
    nn.init.normal_(token.token)
    hidden = MaskedPatches(token, [torch.zeros(2, 16, dtype=torch.bool)])
    seen: list[torch.Tensor] = []
    handle = backbone.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        backbone.encode_own(IMAGES, [1], [torch.arange(16).expand(2, -1)], hidden)
        backbone.encode_own(IMAGES, [3], [torch.arange(4).expand(2, -1)])
    handle.remove()
    for tokens_BSD in seen:
        torch.testing.assert_close(tokens_BSD[:, 1:4], backbone.model.embeddings.register_tokens.expand(2, -1, -1))
