"""Without a class token the mean of an image's own patches stands in its place; a pooling head is not taken over."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_backbones import SIGLIP, SMALL
from transformers import (
    Siglip2Config,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from weights import planned, section, shaken, started

from m3i_scale.backbones.base import MaskedPatches, MaskToken
from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.families import family_of
from m3i_scale.backbones.tokens import TokenBackbone
from m3i_scale.config import BackboneConfig
from m3i_scale.errors import ConfigError
from m3i_scale.evaluation.pictures.model_outputs import encode_attending
from m3i_scale.exports.source import portable_section
from m3i_scale.tasks.segmentation.mask_queries import encode_beside

IMAGES = {
    view: torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(view))
    for view, side in ((1, 32), (2, 32), (3, 16))
}
HALF = torch.stack([torch.arange(0, 16, 2), torch.arange(8)])
"""Of the 16 patches of an image, by image."""
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
WHOLE = SiglipConfig(vision_config=SMALL, text_config=TEXT | {"bos_token_id": 1, "eos_token_id": 2})
FOLDERS = {
    "vision tower": (SiglipVisionModel, SiglipVisionConfig(**SMALL)),
    "vision tower without a head": (SiglipVisionModel, SiglipVisionConfig(**SMALL, vision_use_head=False)),
    "both towers": (SiglipModel, WHOLE),
    "classifier": (SiglipForImageClassification, WHOLE),
}
HEAD = "attention pooling: recipes pool by decoders"


def made(**fields: object) -> TokenBackbone:
    backbone = build_backbone(backbone_config(SIGLIP.model_copy(update={"config": SIGLIP.config | fields})))
    assert isinstance(backbone, TokenBackbone)
    assert not backbone.has_class_token
    return shaken(backbone)


def stock(backbone: TokenBackbone, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Return what stock layers make of one sequence of patches (image, chosen), part by part."""
    model = backbone.model
    parts = [model.embeddings(image[None], interpolate_pos_encoding=True)[:, chosen] for image, chosen in rows]
    hidden = torch.cat(parts, dim=1)
    for layer in model.encoder.layers:
        hidden = layer(hidden, None)
    return list(model.post_layernorm(hidden).split([part.shape[1] for part in parts], dim=1))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_visible_tokens_are_those_of_stock_layers_over_them_alone(kernel: str) -> None:
    backbone = made()
    backbone.model.set_attn_implementation(kernel)
    few = torch.tensor([[0, 3], [1, 2]])
    inputs = backbone.encode_own(IMAGES, [1, 3], [HALF, few])
    for row in range(2):
        for (mean, tokens), view, index in zip(inputs, (1, 3), (HALF[row], few[row]), strict=True):
            (wanted,) = stock(backbone, [(IMAGES[view][row], index)])
            torch.testing.assert_close(tokens[row : row + 1], wanted, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(mean[row : row + 1], wanted.mean(dim=1, keepdim=True), rtol=1e-5, atol=2e-6)


@torch.no_grad()
def test_an_image_of_a_mix_has_the_mean_of_its_own_patches() -> None:
    backbone = made()
    visible, rows = [HALF, 8 + HALF // 2], [torch.tensor([0, 1]), torch.tensor([1, 0])]
    inputs = backbone.encode_mixed(IMAGES, [1, 2], visible, rows)
    for row in range(2):
        wanted = stock(backbone, [(IMAGES[1][row], visible[0][row]), (IMAGES[2][1 - row], visible[1][1 - row])])
        for (mean, tokens), part in zip(inputs, wanted, strict=True):
            torch.testing.assert_close(tokens[row : row + 1], part, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(mean[row : row + 1], part.mean(dim=1, keepdim=True), rtol=1e-5, atol=2e-6)


@torch.no_grad()
def test_there_are_no_maps_of_attention_and_no_class_tokens_of_several_layers() -> None:
    backbone = made()
    (mean, tokens), attended = encode_attending(backbone, IMAGES[1])
    assert attended is None
    torch.testing.assert_close(mean, tokens.mean(dim=1, keepdim=True))
    output = backbone.model(pixel_values=IMAGES[1], output_hidden_states=True)
    torch.testing.assert_close(tokens, output.last_hidden_state, rtol=1e-6, atol=2e-6)
    _, (first,) = backbone.encode_maps(IMAGES[1], [1])
    torch.testing.assert_close(first.flatten(2).transpose(1, 2), output.hidden_states[1], rtol=1e-5, atol=2e-6)
    beside = encode_beside(backbone, IMAGES[1], torch.zeros(2, 0, 64), 1)
    torch.testing.assert_close(beside, output.last_hidden_state, rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match="no class token"):
        backbone.encode_whole(IMAGES[1], blocks=2)


@torch.no_grad()
def test_mask_tokens_stand_before_positions_are_added() -> None:
    backbone, token = made(), MaskToken(64)
    token.token.normal_()
    every = torch.arange(16).expand(2, -1)
    nothing = MaskedPatches(token, [torch.zeros(2, 16, dtype=torch.bool)])
    ((_, tokens),) = backbone.encode_own(IMAGES, [1], [every], nothing)
    hidden = token.token + backbone.model.embeddings.position_embedding.weight[None].expand(2, -1, -1)
    torch.testing.assert_close(tokens, backbone.encode(hidden), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("recomputes", [False, True])
def test_every_parameter_learns(recomputes: bool) -> None:
    plain, backbone = made().train(), made().train()
    if recomputes:
        backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for one in (plain, backbone):
        mean, tokens = one.encode_own(IMAGES, [1], [HALF])[0]
        (mean.square().sum() + tokens.square().sum()).backward()
    for (name, ours), theirs in zip(backbone.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None, name
        assert ours.grad.any() or name.endswith("k_proj.bias")
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("side", [16, 32, 64])
@torch.no_grad()
def test_folders_of_transformers(tmp_path: Path, name: str, side: int) -> None:
    kind, config = FOLDERS[name]
    model = shaken(kind(config))
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, side, side)
    ours, tower = started(tmp_path, image_size=side), getattr(model, "vision_model", model)
    wanted = tower(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours.last_hidden_state(images), wanted, rtol=1e-6, atol=2e-6)
    report = planned(tmp_path, image_size=side).report
    assert [*report["resized"]] == ([] if side == 32 else ["embeddings.position_embedding.weight"])
    left_out = {"both towers": {"text tower", "projection into the joint space"}, "classifier": {"classifier"}}
    assert {*report["left_out"]} == left_out.get(name, set()) | ({HEAD} if "without" not in name else set())
    assert len(report["left_out"].get(HEAD, [])) in (0, 11)
    assert not hasattr(ours.model, "head")


def test_published_names_are_those_below_the_vision_model(tmp_path: Path) -> None:
    """The files on the Hub hold both towers, and name the vision model even where it is alone."""
    SiglipVisionModel(SiglipVisionConfig(**SMALL)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    named = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in weights.items()}
    save_file(named, tmp_path / "model.safetensors")
    report = planned(tmp_path).report
    assert report["loaded"] + len(report["left_out"][HEAD]) == len(named)


def test_a_weight_that_is_missing_is_told(tmp_path: Path) -> None:
    SiglipVisionModel(SiglipVisionConfig(**SMALL)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["post_layernorm.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path)
    assert caught.value.where == "backbone.from_pretrained"
    assert "post_layernorm.bias" in caught.value.what


def test_images_that_patches_do_not_fill_get_a_size_with_the_same_grid(tmp_path: Path) -> None:
    """The published tower of 384 pixels has patches of 14: 27 of them, and 6 pixels that it never reads."""
    SiglipVisionModel(SiglipVisionConfig(**SMALL | {"image_size": 35})).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        backbone_config(section(tmp_path))
    assert caught.value.where == "backbone.config"
    assert caught.value.fix == "set backbone.config.image_size=32"
    assert planned(tmp_path, image_size=32).report["resized"] == {}


@pytest.mark.parametrize("config", [Siglip2Config, Siglip2VisionConfig])
def test_naflex_is_refused_and_what_to_take_instead_is_named(tmp_path: Path, config: type) -> None:
    config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        backbone_config(section(tmp_path))
    assert caught.value.where == "backbone.from_pretrained"
    assert "fixed size" in caught.value.fix


@pytest.mark.parametrize(
    ("preset", "side", "architecture"),
    [
        ("siglip-b/16", 224, "vit_base_patch16_siglip_gap_224"),
        ("siglip-l/16", 256, "vit_large_patch16_siglip_gap_256"),
        ("siglip-so400m/14", 224, "vit_so400m_patch14_siglip_gap_224"),
        ("siglip-so400m/16", 256, "vit_so400m_patch16_siglip_gap_256"),
    ],
)
def test_presets_have_the_parameters_of_timms(preset: str, side: int, architecture: str) -> None:
    with torch.device("meta"):
        ours = build_backbone(backbone_config(BackboneConfig(preset=preset, config={"image_size": side})))
        theirs = timm.create_model(architecture, num_classes=0)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == counts[1]
    assert ours.model.config.num_attention_heads == theirs.blocks[0].attn.num_heads


def test_a_section_that_needs_no_folder_has_no_head_either(tmp_path: Path) -> None:
    SiglipVisionModel(SiglipVisionConfig(**SMALL)).save_pretrained(tmp_path)
    config = backbone_config(section(tmp_path))
    again = backbone_config(BackboneConfig(**portable_section(config)))
    for key in family_of(config).shape_fields:
        assert getattr(again, key) == getattr(config, key)
    assert again.vision_use_head is False
