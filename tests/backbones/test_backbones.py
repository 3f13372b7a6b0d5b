"""The stock ViT behind the adapter, and the refusal of what is no ViT."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from transformers import (
    BertConfig,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from weights import shaken

from m3i_scale.backbones.base import MaskedPatches, MaskToken
from m3i_scale.backbones.build import backbone_config, build_backbone, vision_class
from m3i_scale.backbones.families import PRESETS
from m3i_scale.backbones.sources import pretrained_folder
from m3i_scale.config import BackboneConfig
from m3i_scale.errors import ConfigError
from m3i_scale.evaluation.features import last_norm

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}


def small(**fields: object) -> BackboneConfig:
    return BackboneConfig(config={**SMALL, **fields})


DINOV2 = BackboneConfig(
    preset="dinov2-g/14",
    config={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
)


CLIP = BackboneConfig(preset="clip-b/16", config=SMALL)
REGISTERS = BackboneConfig(preset="dinov2-reg-g/14", config=DINOV2.config | {"num_register_tokens": 3})
DINOV3 = BackboneConfig(preset="dinov3-s+/16", config=SMALL | {"num_register_tokens": 2})
SIGLIP = BackboneConfig(preset="siglip-b/16", config=SMALL)
SECTIONS = {
    **{"vit": small(), "dinov2": DINOV2, "clip": CLIP, "siglip": SIGLIP},
    **{"registers": REGISTERS, "dinov3": DINOV3},
}
CLASSES = {
    "vit": ViTModel,
    "dinov2": Dinov2Model,
    "clip": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "registers": Dinov2WithRegistersModel,
    "dinov3": DINOv3ViTModel,
}


def tokens_of(name: str, hidden: torch.Tensor, patches: int) -> torch.Tensor:
    """Class token, or the mean of the patches where there is none, and the patches of a last hidden state."""
    first = hidden[:, -patches:].mean(dim=1, keepdim=True) if name == "siglip" else hidden[:, :1]
    return torch.cat([first, hidden[:, -patches:]], dim=1)


each_family = pytest.mark.parametrize("name", SECTIONS)


@each_family
def test_the_adapter_is_the_stock_model(name: str) -> None:
    section = SECTIONS[name]
    backbone = build_backbone(backbone_config(section)).eval()
    kind, options = vision_class(backbone_config(section))
    stock = kind(backbone_config(section), **options).eval()
    assert type(stock) is CLASSES[name]
    stock.load_state_dict(backbone.model.state_dict(), strict=True)
    with torch.no_grad():
        for parameter, other in zip(backbone.model.parameters(), stock.parameters(), strict=True):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
            other.copy_(parameter)
    images = torch.randn(2, 3, 32, 32)
    prefix, tokens = backbone.embed(images)
    first = {"registers": 4, "dinov3": 3, "siglip": 0}.get(name, 1)
    assert (prefix.shape, tokens.shape) == ((2, first, 64), (2, 16, 64))
    wanted = stock(pixel_values=images).last_hidden_state
    torch.testing.assert_close(backbone.last_hidden_state(images), wanted, rtol=1e-6, atol=1e-6)
    wanted = last_norm(stock, wanted)
    torch.testing.assert_close(backbone.encode(torch.cat([prefix, tokens], dim=1), backbone.angles(images)), wanted)
    wanted = tokens_of(name, wanted, 16)
    torch.testing.assert_close(torch.cat(backbone.encode_whole(images), dim=1), wanted)
    every = torch.arange(16).expand(2, -1)
    (own,) = backbone.encode_own({1: images}, [1], [every])
    torch.testing.assert_close(torch.cat(own, dim=1), wanted)
    assert len(backbone.layers) == 2


@each_family
@torch.no_grad()
def test_images_of_another_size_have_the_positions_of_the_stock_model(name: str) -> None:
    backbone = build_backbone(backbone_config(SECTIONS[name])).eval()
    shaken(backbone)
    images = torch.randn(2, 3, 16, 16)
    options = {"interpolate_pos_encoding": True} if name in ("vit", "clip", "siglip") else {}
    wanted = last_norm(backbone.model, backbone.model(pixel_values=images, **options).last_hidden_state)
    ((cls, tokens),) = backbone.encode_own({3: images}, [3], [torch.arange(4).expand(2, -1)])
    torch.testing.assert_close(torch.cat([cls, tokens], dim=1), tokens_of(name, wanted, 4), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["vit", "dinov2", "registers", "dinov3"])
@torch.no_grad()
def test_mask_tokens_are_those_of_the_stock_model(name: str) -> None:
    config = backbone_config(SECTIONS[name])
    backbone = build_backbone(config).eval()
    shaken(backbone)
    if name == "vit":
        stock = ViTModel(config, add_pooling_layer=False, use_mask_token=True)
    else:
        config.use_mask_token = True  # which only Dinov2Model asks
        stock = CLASSES[name](config)
    stock.load_state_dict(backbone.model.state_dict(), strict=False)
    token = MaskToken(64)
    token.token.normal_()
    stock.embeddings.mask_token.data = token.token.view(stock.embeddings.mask_token.shape).clone()
    images, hidden = torch.randn(3, 3, 32, 32), torch.rand(3, 16) < 0.4
    wanted = stock.eval()(pixel_values=images, bool_masked_pos=hidden).last_hidden_state
    every = torch.arange(16).expand(3, -1)
    ((cls, tokens),) = backbone.encode_own({1: images}, [1], [every], MaskedPatches(token, [~hidden]))
    torch.testing.assert_close(torch.cat([cls, tokens], dim=1), wanted[:, [0, *range(-16, 0)]])


@each_family
@torch.no_grad()
def test_inputs_of_all_kinds_together_are_what_each_is_alone(name: str) -> None:
    backbone, token = build_backbone(backbone_config(SECTIONS[name])).eval(), MaskToken(64)
    shaken(backbone)
    token.token.normal_()
    views = {1: torch.randn(2, 3, 32, 32), 2: torch.randn(2, 3, 32, 32), 3: torch.randn(2, 3, 16, 16)}
    every, few = torch.arange(16).expand(2, -1), torch.arange(4).expand(2, -1)
    view_of, visible = [1, 1, 1, 2, 3], [every, every, every[:, ::2], every, few]
    shown = [None, torch.rand(2, 16) < 0.5, None, torch.rand(2, 16) < 0.5, None]
    together = backbone.encode_own(views, view_of, visible, MaskedPatches(token, shown))
    for number, tokens in enumerate(together):
        masked = MaskedPatches(token, [shown[number]])
        (alone,) = backbone.encode_own(views, [view_of[number]], [visible[number]], masked)
        for ours, wanted in zip(tokens, alone, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0][0], together[1][0], atol=1e-3)


def test_eva_g_has_the_parameters_of_timms_and_a_bias_of_keys() -> None:
    config = backbone_config(BackboneConfig(preset="eva-g/14"))
    with torch.device("meta"):
        ours = build_backbone(config).model
        theirs = timm.create_model("eva_giant_patch14_224", num_classes=0, global_pool="token")
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    assert sizes[0] - sizes[1] == 40 * 1408
    assert config.initializer_range == 0.015


@torch.no_grad()
def test_a_bias_of_keys_changes_nothing() -> None:
    """So that a ViT computes what EVA, which has none, computes."""
    backbone = build_backbone(backbone_config(BackboneConfig(preset="eva-g/14", config=SMALL))).eval()
    shaken(backbone)
    images = torch.randn(2, 3, 32, 32)
    before = backbone.last_hidden_state(images)
    for layer in backbone.layers:
        layer.attention.k_proj.bias.normal_()
    torch.testing.assert_close(backbone.last_hidden_state(images), before, rtol=1e-5, atol=1e-5)
    for layer in backbone.layers:
        layer.attention.q_proj.bias.normal_()
    assert not torch.allclose(backbone.last_hidden_state(images), before, atol=1e-2)


def test_dinov2_g_has_its_gated_mlp_and_scales() -> None:
    config = backbone_config(BackboneConfig(preset="dinov2-g/14"))
    with torch.device("meta"):
        layer = build_backbone(config).layers[0]
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes["mlp.gate_proj.weight"] == shapes["mlp.up_proj.weight"] == (4096, 1536)
    assert shapes["layer_scale1.lambda1"] == (1536,)


def test_it_takes_any_subset_of_patches() -> None:
    backbone = build_backbone(backbone_config(small()))
    cls, tokens = backbone.embed(torch.randn(2, 3, 32, 32))
    assert backbone.encode(torch.cat([cls, tokens[:, [1, 5, 2]]], dim=1)).shape == (2, 4, 64)


def test_what_it_tells_of_itself() -> None:
    backbone = build_backbone(backbone_config(small()))
    assert (backbone.width, backbone.image_size, backbone.patch_size, backbone.grid) == (64, 32, 8, (4, 4))
    assert len(backbone.layers) == 2
    assert backbone.dtype == torch.float32
    assert build_backbone(backbone_config(small())).bfloat16().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("vit-b/16", 85.8),
        ("vit-h/14", 630.8),
        ("vit-g/14", 1011),
        ("eva-g/14", 1011),
        ("clip-b/16", 85.8),
        ("clip-l/14", 303.2),
        ("clip-h/14", 630.8),
        ("clip-G/14", 1843),
        ("vit-G/14", 1843),
        ("siglip-b/16", 85.80),  # the table of timm's vit_*_siglip_gap_*, which have no pooling either
        ("siglip-l/16", 303.36),
        ("siglip-so400m/14", 412.44),
        ("siglip-so400m/16", 412.65),
        ("dinov2-g/14", 1135),
        ("dinov2-b/14", 85.7),
        ("dinov2-reg-s/14", 21.6),  # the table of facebookresearch/dinov2
        ("dinov2-reg-g/14", 1135),
        ("dinov3-s/16", 21.6),  # Siméoni et al., and the table of facebookresearch/dinov3
        ("dinov3-s+/16", 28.7),
        ("dinov3-b/16", 85.7),
        ("dinov3-l/16", 303),
        ("dinov3-h+/16", 840.5),
        ("dinov3-7b/16", 6716),
    ],
)
def test_presets_have_the_published_size(preset: str, millions: float) -> None:
    config = backbone_config(BackboneConfig(preset=preset))
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build_backbone(config).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=2e-3)


def test_every_preset_is_a_valid_configuration() -> None:
    for preset in PRESETS:
        config = backbone_config(BackboneConfig(preset=preset))
        assert config.layer_norm_eps == (1e-5 if preset.startswith(("clip", "dinov3")) else 1e-6)
        assert config.image_size % config.patch_size == 0
        if hasattr(config, "num_attention_heads"):
            assert config.hidden_size % config.num_attention_heads == 0


FAULTS = {
    "unknown preset": (BackboneConfig(preset="vit-x/16"), "backbone.preset"),
    "unknown field": (small(hiden_size=8), "backbone.config"),
    "patch": (small(patch_size=7), "backbone.config"),
    "heads": (small(num_attention_heads=3), "backbone.config.hidden_size"),
    "no registers": (
        BackboneConfig(preset="dinov3-s/16", config=SMALL | {"num_register_tokens": 0}),
        "backbone.config.num_register_tokens",
    ),
    "registers' patch": (
        BackboneConfig(preset="dinov2-reg-s/14", config={"image_size": 200}),
        "backbone.config",
    ),
    "rotary patch": (
        BackboneConfig(preset="dinov3-s/16", config={"image_size": 200}),
        "backbone.config",
    ),
    "rotary heads": (
        BackboneConfig(preset="dinov3-s/16", config=SMALL | {"num_attention_heads": 32}),
        "backbone.config.num_attention_heads: 32",
    ),
    "drawn coordinates": (
        BackboneConfig(preset="dinov3-s/16", config={"pos_embed_rescale": 2.0}),
        "backbone.config.pos_embed_rescale",
    ),
    "siglip's head": (
        BackboneConfig(preset="siglip-b/16", config={"vision_use_head": True}),
        "backbone.config.vision_use_head: True",
    ),
    "siglip's patch": (
        BackboneConfig(preset="siglip-so400m/14", config={"image_size": 384}),
        "backbone.config",
    ),
    "sides": (small(image_size=[32, 16]), "backbone.config.image_size: [32, 16]"),
    "nowhere": (BackboneConfig(from_pretrained="/nowhere/at/all"), "backbone.from_pretrained"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_vit_is_refused(fault: str) -> None:
    config, where = FAULTS[fault]
    with pytest.raises(ConfigError) as caught:
        backbone_config(config)
    assert caught.value.where == where


def test_a_misspelt_field_gets_a_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        backbone_config(small(hiden_size=8))
    assert caught.value.where == "backbone.config"
    assert "'hidden_size'" in caught.value.fix


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        backbone_config(BackboneConfig(from_pretrained=str(tmp_path)))
    assert caught.value.where == "backbone.from_pretrained"
    assert "bert" in caught.value.what


def test_a_pretrained_folder_gives_its_own_shape(tmp_path: Path) -> None:
    ViTConfig(**SMALL).save_pretrained(tmp_path)
    config = backbone_config(BackboneConfig(from_pretrained=str(tmp_path)))
    assert (config.hidden_size, config.image_size, config.patch_size) == (64, 32, 8)
    assert pretrained_folder(str(tmp_path)) == tmp_path
