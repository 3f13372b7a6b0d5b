"""What differs between a checkpoint and a run is told field by field; published weights fill a backbone."""

import pytest
import torch
from published import FULL, model_of, published_folder

from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.config import BackboneConfig
from m3i_scale.errors import ConfigError
from m3i_scale.run.setup import _difference, _pretrained_weights
from m3i_scale.scale.partition import copy_into


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"width": 64, "depth": 2}, {"width": 64, "depth": 3}, "backbone.depth was 2, and is 3"),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 5]}}, "backbone.a.b.1 was 2, and is 5"),
        ({"a": [1]}, {"a": [1, 2]}, "backbone.a was [1], and is [1, 2]"),
        ({}, {"new": True}, "backbone.new was null, and is true"),
        (None, {"width": 64}, 'backbone was null, and is {"width": 64}'),
        ({"name": "a", "x": 1}, {"name": "a", "x": 2}, "backbone.x was 1, and is 2"),
    ],
)
def test_the_field_that_changed_is_named(before, now, told):
    assert _difference("backbone", before, now) == told


def test_recipes_of_other_names_are_told_by_them():
    assert _difference("recipe", {"name": "mae", "x": 1}, {"name": "sim"}) == "recipe was 'mae', and is 'sim'"


def test_many_changes_are_counted():
    before, now = ({str(number): number + shift for number in range(9)} for shift in (0, 1))
    told = _difference("backbone", before, now)
    assert told.count(" was ") == 5
    assert told.endswith("and 4 more")


@pytest.mark.parametrize("shape", [{}, {**FULL, "fusion_width": 1024}], ids=["without head", "with head"])
def test_published_weights_fill_all_but_a_head_that_is_not_there(tmp_path, shape):
    published = model_of(**shape)
    section = BackboneConfig(from_pretrained=str(published_folder(tmp_path, published)))
    backbone = build_backbone(backbone_config(section))
    assert backbone.width == (1024 if shape else 128)
    before = {name: torch.full_like(value, 0.25) for name, value in backbone.model.named_parameters()}
    backbone.model.load_state_dict(before)
    values = _pretrained_weights(section)
    assert sorted(name for name, value in values.items() if value is None) == (
        [] if shape else [f"dcnv3_head_x{part}.{kind}" for part in ("3", "4.0") for kind in ("bias", "weight")]
    )
    copy_into(backbone, "model.", values)
    wanted = before | dict(published.named_parameters())
    for name, parameter in backbone.model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


@pytest.mark.parametrize(
    ("shape", "fields", "told"),
    [
        ({}, {"depths": [1, 1, 1, 1]}, "find no place"),
        ({**FULL, "fusion_width": 1024}, {"center_feature_scale": False}, "find no place"),
        ({}, {"level2_post_norm": True, "level2_post_norm_block_ids": [1]}, "2 weights of .* are missing"),
        ({}, {"channels": 32}, "cannot start from|have another shape"),
    ],
)
def test_a_shape_that_the_published_weights_do_not_have_is_refused(tmp_path, shape, fields, told):
    section = BackboneConfig(from_pretrained=str(published_folder(tmp_path, model_of(**shape))), config=fields)
    with pytest.raises(ConfigError, match=told):
        _pretrained_weights(section)


def test_a_head_that_its_own_configuration_promises_must_be_there(tmp_path):
    folder = published_folder(tmp_path, model_of(), use_clip_projector=True)
    with pytest.raises(ConfigError, match=r"4 weights of .* are missing"):
        _pretrained_weights(BackboneConfig(from_pretrained=str(folder)))
