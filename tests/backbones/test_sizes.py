"""Counted parameters and multiply-adds against the published tables."""

from __future__ import annotations

import json

import pytest
import torch
from backbone_sizes import describe_backbone
from forked import Forks

from m3i_scale.backbones import describe_presets
from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.backbones.families import PRESETS
from m3i_scale.backbones.flops import counter
from m3i_scale.config import BackboneConfig
from m3i_scale.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("preset", "side", "published_gmac"),
    [
        ("internimage-t", 224, 5),
        ("internimage-s", 224, 8),
        ("internimage-b", 224, 16),
        ("internimage-l", 384, 108),
        ("internimage-xl", 384, 163),
        ("internimage-h", 640, 1478),
        ("internimage-g", 512, 2700),
    ],
)
def test_multiply_adds_are_those_of_the_internimage_paper(preset: str, side: int, published_gmac: float) -> None:
    row = describe_backbone(BackboneConfig(preset=preset, config={"image_size": side}), preset)
    # They count their classifier, and we the fusion head: both are a small part.
    assert row["gmac"] == pytest.approx(published_gmac, rel=0.02, abs=0.5)
    assert (row["patch_size"], row["mask_cell"], row["tokens"]) == (16, 32, (side // 16) ** 2)


@pytest.mark.parametrize(("preset", "published_gmac"), [("vit-b/16", 17.6), ("vit-l/16", 61.6), ("vit-h/14", 167.3)])
def test_multiply_adds_are_those_of_published_transformers(preset: str, published_gmac: float) -> None:
    row = describe_backbone(BackboneConfig(preset=preset), preset)
    assert row["gmac"] == pytest.approx(published_gmac, rel=0.01)
    assert row["mask_cell"] == row["patch_size"]


def test_every_preset_has_its_size_stored() -> None:
    assert tuple(row["name"] for row in describe_presets([])) == PRESETS


def once(preset: str) -> object:
    """Larger InternImages take ten seconds each; their counts are held against the paper, above."""
    is_large = preset.startswith("internimage-") and preset != "internimage-t"
    return pytest.param(preset, marks=[pytest.mark.bench] if is_large else [])


@pytest.mark.parametrize("preset", [once(preset) for preset in PRESETS])
def test_stored_sizes_are_those_that_are_counted(preset: str) -> None:
    """Regenerate the file with `python tests/backbone_sizes.py > m3i_scale/backbones/sizes.json`."""
    counted = describe_backbone(BackboneConfig(preset=preset), preset)
    assert describe_presets([preset]) == [counted | {"gmac": pytest.approx(counted["gmac"], abs=1e-4)}]


@pytest.mark.parametrize(
    ("preset", "field", "value"),
    [
        ("vit-b/16", "hidden_act", "gelru"),
        ("clip-b/16", "hidden_act", "gelru"),
        ("vit-b/16", "hidden_act", ["gelu"]),
        ("dinov2-s/14", "hidden_act", {}),
        ("vit-b/16", "hidden_dropout_prob", 5),
        ("vit-b/16", "attention_probs_dropout_prob", -0.1),
        ("clip-b/16", "attention_dropout", 1),
        ("dinov2-s/14", "drop_path_rate", 2),
        ("vit-b/16", "initializer_range", -0.02),
        ("internimage-t", "layer_norm_eps", 0),
        ("vit-b/16", "num_hidden_layers", True),
    ],
)
def test_a_field_that_its_model_can_do_nothing_with_is_named(preset: str, field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        backbone_config(BackboneConfig(preset=preset, config={field: value}))
    assert f"backbone.config.{field}" in str(caught.value.where)


@pytest.mark.parametrize("preset", ["vit-s/16", "eva-g/14", "clip-b/32", "dinov2-s/14", "internimage-t"])
def test_a_backward_pass_has_twice_the_products_of_the_forward_pass(preset: str) -> None:
    config = backbone_config(BackboneConfig(preset=preset))
    with torch.device("meta"), counter() as counted:
        tokens_BLD = build_backbone(config).last_hidden_state(torch.zeros(1, 3, 224, 224))
        forward = counted.get_total_flops()
        tokens_BLD.sum().backward()
    assert 1.9 < counted.get_total_flops() / forward - 1 < 2.1


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_the_gradients_of_a_convolution_cost_what_it_does_whatever_its_groups(kind: type, groups: int) -> None:
    layer, image_BCHW = kind(8, 16, 3, stride=2, groups=groups), torch.zeros(2, 8, 9, 9)
    with counter() as counted:
        output = layer(image_BCHW)
        forward = counted.get_total_flops()
        output.sum().backward()
    assert counted.get_total_flops() == 2 * forward  # the image has no gradient
    image_BCHW.requires_grad_()
    with counter() as counted:
        layer(image_BCHW).sum().backward()
    assert counted.get_total_flops() == 3 * forward


def test_a_preset_that_is_none() -> None:
    with pytest.raises(ConfigError) as caught:
        describe_presets(["vit-b/61"])
    assert "'vit-b/61'" in caught.value.what


def test_the_command(forks: Forks) -> None:
    found = json.loads(forks.run("backbones", "dinov2-g/14", "vit-g/14", "--json").stdout)
    assert [(row["name"], round(row["parameters"] / 1e6)) for row in found] == [
        ("dinov2-g/14", 1135),
        ("vit-g/14", 1011),
    ]
    everything = forks.run("backbones").stdout
    heading, *lines = everything.splitlines()
    assert heading.split()[0] == "preset"
    assert [line.split()[0] for line in lines[: len(PRESETS)]] == list(PRESETS)
    assert max(map(len, lines)) <= 80
