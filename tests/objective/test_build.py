"""From run files to modules, and their first weights."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import GRID, LABEL_SETS, RECIPES, VOCABULARY, random_batch, tiny_objective, tiny_run
from torch import nn

from m3i_scale.config import TextConfig
from m3i_scale.engine.partition import initialize_sharded
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective, ema_pairs, initialize_module
from m3i_scale.objective.positions import grid_position
from m3i_scale.objective.text_config import text_config


def build(recipe: str, *overrides: str, labels: bool = True, vocabulary: int | None = VOCABULARY) -> nn.Module:
    return build_objective(tiny_run(recipe, *overrides), LABEL_SETS if labels else {}, vocabulary)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_what_it_needs_and_nothing_else(recipe: str) -> None:
    objective = build(recipe)
    spec = objective.recipe
    assert (objective.text is not None) == spec.uses_text_tower
    assert (objective.momentum is not None) == (spec.ema is not None)
    residual = spec.projects_dense_targets and spec.ema.projector_depth > 0
    assert (objective.projector is not None) == residual == bool(spec.ema and len(objective.momentum.projector.blocks))
    assert set(objective.teachers) == set(spec.teachers)
    assert set(objective.heads) == {target.name for target in spec.targets if target not in spec.head_targets}
    assert set(objective.image_heads) == set(spec.heads)
    assert set(objective.states) == {target.memory_name for target in spec.head_targets}
    assert set(spec.heads) == {target.head for target in spec.head_targets}
    assert set(objective.decoders) == set(spec.decoders)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_trained_parameter_gets_a_gradient_and_no_other(recipe: str) -> None:
    objective = tiny_objective(recipe)
    loss, _ = objective(random_batch(6))
    loss.backward()
    for name, parameter in objective.named_parameters():
        if name.startswith(("momentum.", "teachers.")) or not parameter.requires_grad:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name


def test_ema_pairs_name_equal_shapes() -> None:
    objective = build("m3i")
    named = dict(objective.named_parameters())
    pairs = ema_pairs(objective)
    assert {target for _, target in pairs} == {name for name in named if name.startswith("momentum.")}
    assert all(named[online].shape == named[target].shape for online, target in pairs)
    assert ("student.model.embeddings.cls_token", "momentum.backbone.model.embeddings.cls_token") in pairs
    assert any(online.startswith("projector.") for online, _ in pairs)
    assert ema_pairs(build("mae")) == []


def test_projector_depth_zero_means_none() -> None:
    objective = tiny_objective("m3i", "recipe.ema.projector_depth=0")
    assert objective.projector is None
    assert not any(online.startswith("projector.") for online, _ in ema_pairs(objective))
    assert torch.isfinite(objective(random_batch(4))[0])


FAULTS = {
    "attention without a mix": (
        ("mae", "backbone.attention=across_images"),
        {},
        "backbone.attention",
    ),
    "no labels": (("supervised",), {"labels": False}, "shards make"),
    "no tokenizer": (("clip",), {"vocabulary": None}, "text.tokenizer"),
    "micro-batch below the mix": (("m3i", "optim.micro_batch_size=1"), {}, "optim.micro_batch_size"),
    "one patch for two": (("m3i", "backbone.config.patch_size=32"), {}, "backbone.config"),
    "decoder heads": (("mae", "recipe.decoders.pixels.heads=3"), {}, "recipe.decoders.pixels"),
    "pool heads": (("m3i", "recipe.decoders.pool={kind: attention_pool, heads: 5}"), {}, "recipe.decoders.pool"),
    "unknown text field": (("clip", "text.config.hiden_size=8"), {}, "hidden_size"),
    "vocabulary by hand": (("clip", "text.config.vocab_size=8"), {}, "vocab_size"),
    "text heads": (("clip", "text.config.num_attention_heads=3"), {}, "text.config"),
    "too many tokens": (("clip", "text.max_tokens=600"), {}, "text.config.max_position_embeddings"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(fault: str) -> None:
    arguments, keywords, key = FAULTS[fault]
    with pytest.raises(ConfigError) as caught:
        build(*arguments, **keywords)
    assert key in (caught.value.where or "") + (caught.value.fix or "")


def test_text_targets_share_one_width() -> None:
    second = (
        "recipe.targets=[{name: t1, kind: text, inputs: [x], decoder: pool, width: 32}, "
        "{name: t2, kind: text, inputs: [x], decoder: pool, width: 16}]"
    )
    with pytest.raises(ConfigError) as caught:
        build("clip", second)
    assert caught.value.where == "recipe"
    assert "[16, 32]" in caught.value.what


def test_the_text_tower_is_bert_base_unless_told_otherwise() -> None:
    config = text_config(TextConfig(), 100, 64)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (12, 768, 100)
    assert text_config(TextConfig(config={"num_hidden_layers": 3}), 100, 64).num_hidden_layers == 3


@torch.no_grad()
def test_first_weights_are_those_of_the_stock_models() -> None:
    objective = tiny_objective("m3i")
    layer = objective.student.layers[0]
    assert 0.015 < float(layer.mlp.fc1.weight.std()) < 0.025
    assert not layer.mlp.fc1.bias.any()
    assert torch.equal(layer.layernorm_before.weight, torch.ones(64))
    positions_LD = objective.student.model.embeddings.position_embeddings[0]
    assert not positions_LD[0].any()
    assert torch.equal(positions_LD[1:], grid_position(GRID, 64, torch.device("cpu")))
    assert 0.01 < float(objective.decoders["dense"].mask_token.std()) < 0.03
    assert float(objective.heads["text"].log_scale.exp()) == pytest.approx(1 / 0.07, rel=1e-5)
    assert 0.015 < float(objective.text.model.embeddings.word_embeddings.weight.std()) < 0.025
    assert not objective.text.model.embeddings.word_embeddings.weight[0].any()  # padding


@torch.no_grad()
def test_first_weights_of_our_own_layers_pass_on_what_they_get_at_any_width() -> None:
    """Xavier's, as MAE's decoder; the classifier begins without an opinion."""
    objective = tiny_objective("m3i")
    for layer in (
        objective.decoders["dense"].embed,
        objective.projector.blocks[0][1],
        objective.heads["intra"].projection,
    ):
        wanted = math.sqrt(2 / sum(layer.weight.shape))
        assert float(layer.weight.std()) == pytest.approx(wanted, rel=0.1), layer
        assert not layer.bias.any()
    assert 0.01 < float(objective.heads["category"].sets[0].weight.std()) < 0.03


def test_no_parameter_is_left_without_a_first_value() -> None:
    """Whatever memory holds before, the values afterwards are those of the seed."""
    weights = []
    for filler in (7.0, float("nan")):
        objective = build("m3i")
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter.fill_(filler)
        initialize_sharded(objective, initialize_module, seed=3, skip=("momentum.",))
        weights.append({n: p for n, p in objective.named_parameters() if not n.startswith("momentum.")})
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize(
    ("recipe", "override", "where"),
    [
        ("ijepa", "recipe.inputs.0.mask.form.scale=0.05", "recipe.inputs"),
        ("data2vec2", "recipe.targets.0.layers=3", "recipe.targets"),
        ("data2vec2", "recipe.decoders.dense.groups=24", "recipe.decoders.dense"),
    ],
)
def test_what_the_backbone_is_too_small_for(recipe: str, override: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(recipe, override)
    assert caught.value.where == where
