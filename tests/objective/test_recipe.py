"""Recipes: the built-in ones hold together, and every fault is refused with its reason."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from m3i_scale.config import known_recipes, load_run
from m3i_scale.errors import ConfigError
from m3i_scale.objective.describe import describe
from m3i_scale.objective.recipe import parse_recipe


def values(name: str = "m3i") -> dict[str, Any]:
    return copy.deepcopy(load_run(name).recipe)


@pytest.mark.parametrize("name", known_recipes())
def test_built_in_recipes_hold_together_and_describe_themselves(name: str) -> None:
    recipe = parse_recipe(values(name))
    told = describe(recipe)
    assert told["name"] == name
    assert [target["name"] for target in told["targets"]] == [target.name for target in recipe.targets]
    assert all(entry["mixed"] == (recipe.mix is not None) for entry in told["inputs"])


def test_the_all_in_one_recipe_is_that_of_the_paper() -> None:
    recipe = parse_recipe(values())
    assert (recipe.views, recipe.uses_text, recipe.uses_categories, recipe.uses_momentum) == (2, True, True, True)
    intra, inter, text, category = recipe.targets
    assert recipe.input(intra.inputs[0]).view == intra.view  # the same view
    assert recipe.input(inter.inputs[0]).view != inter.view  # a different view
    assert text.inputs == category.inputs == ["a", "b"]
    assert describe(recipe)["inputs"][0]["mask"] == "random, complementary"


def test_what_the_other_recipes_need() -> None:
    needs = {
        name: (recipe.views, recipe.uses_text, recipe.uses_categories, recipe.uses_momentum)
        for name in ("clip", "mae", "sim", "supervised")
        for recipe in [parse_recipe(values(name))]
    }
    assert needs == {
        "clip": (1, True, False, False),
        "mae": (1, False, False, False),
        "sim": (2, False, False, True),
        "supervised": (1, False, True, False),
    }


def target(number: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda recipe: recipe["targets"][number].update(fields)


def section(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda recipe: recipe[name].update(fields)


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda recipe: recipe.pop(name)


def unread_input(recipe: dict[str, Any]) -> None:
    recipe["inputs"].append({"name": "c", "view": 1})
    recipe["mix"]["inputs"].append("c")


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "unknown key": ("m3i", section("mix", fom="block"), "unknown key 'recipe.mix.fom'.*did you mean 'form'"),
    "unknown key of a target": (
        "m3i",
        target(0, wieght=2),
        r"unknown key 'recipe.targets.0.wieght'.*did you mean 'weight'",
    ),
    "misspelt key that is required": (
        "m3i",
        lambda r: r["targets"][0].update(decodr=r["targets"][0].pop("decoder")),
        r"unknown key 'recipe.targets.0.decodr'.*did you mean 'decoder'",
    ),
    "unknown top key": ("m3i", lambda r: r.update(decoder={}), "unknown key 'recipe.decoder'.*did you mean 'decoders'"),
    "missing key": ("m3i", drop("inputs"), "'recipe.inputs' is missing"),
    "no target": ("m3i", lambda r: r.update(targets=[]), "targets"),
    "zero ratio": ("mae", lambda r: r["inputs"][0]["mask"].update(ratio=0), "ratio"),
    "whole ratio": ("mae", lambda r: r["inputs"][0]["mask"].update(ratio=1), "ratio"),
    "view zero": ("m3i", lambda r: r["inputs"][0].update(view=0), "view"),
    "weight zero": ("m3i", target(0, weight=0), "weight"),
    "unknown input": ("m3i", target(0, inputs=["aa"]), "target 'intra': no input 'aa'.*did you mean|known"),
    "unknown decoder": ("m3i", target(0, decoder="dens"), "no decoder 'dens'; did you mean 'dense'"),
    "unread input": ("m3i", unread_input, "no target is predicted from input 'c'"),
    "idle decoder": ("m3i", section("decoders", extra={"kind": "mean_pool"}), "no target uses decoder 'extra'"),
    "same input twice": ("mae", lambda r: r["inputs"].append(r["inputs"][0]), "two inputs are called 'x'"),
    "same target twice": ("m3i", lambda r: r["targets"].append(r["targets"][0]), "two targets are called 'intra'"),
    "mix lacks an input": ("m3i", section("mix", inputs=["a", "a"]), "must name every input once"),
    "mix of one": ("m3i", section("mix", inputs=["a"]), "mix.inputs"),
    "mask inside a mix": ("m3i", lambda r: r["inputs"][0].update(mask={"ratio": 0.5}), "have no mask of their own"),
    "gap in the views": (
        "m3i",
        lambda r: r["inputs"][1].update(view=3),
        "without gaps, but nothing has view 2: input 'b' has view 3",
    ),
    "a target's view out of reach": ("m3i", target(0, view=7), "nothing has view 3: target 'intra' has view 7"),
    "idle momentum": ("mae", lambda r: r.update(momentum={}), "`momentum` has no effect"),
    "missing momentum": ("sim", drop("momentum"), "needs a `momentum` section"),
    "wrong encoder": (
        "m3i",
        target(2, encoder="embedding"),
        "a text with boltzmann .* no such encoder .text_tower.",
    ),
    "wrong distribution": (
        "m3i",
        target(0, distribution="boltzmann"),
        "'unigrad' does not go with a boltzmann distribution; valid: gaussian",
    ),
    "wrong decoder kind": ("m3i", target(0, decoder="pool"), "decoded by transformer or pointwise, not mean_pool"),
    "dense decoder for text": (
        "m3i",
        target(2, decoder="dense"),
        "decoded by attention_pool or mean_pool or class_token, not transformer",
    ),
    "no collapse control": (
        "m3i",
        target(0, regularizer="none"),
        "'none' does not keep it from collapsing.*valid: gaussian . stop_gradient",
    ),
    "idle regularizer": ("mae", target(0, regularizer="unigrad"), "valid: gaussian . none"),
    "view on text": ("m3i", target(2, view=1), "`view` and `tokens` have no effect on a text"),
    "dense without view": ("m3i", lambda r: r["targets"][0].pop("view"), "needs `view` and `tokens`"),
    "masked between views": ("m3i", target(1, tokens="masked"), "use `all` between views"),
    "masked without mask": ("mae", lambda r: r["inputs"][0].pop("mask"), "the input hides no patch"),
    "absolute between views": ("sim", lambda r: r["decoders"]["dense"].update(position="absolute"), "relative"),
    "idle width": ("m3i", target(3, width=64), "`width` has no effect here: it is for "),
    "idle temperature": ("m3i", target(0, temperature=0.1), "`temperature` has no effect here: it is for "),
    "idle direction": ("siglip", target(0, direction="forward"), "`direction` has no effect here: it is for "),
    "idle smoothing": ("m3i", target(2, label_smoothing=0.1), "`label_smoothing` has no effect here: it is for "),
    "idle normalisation": (
        "m3i",
        target(0, normalize_pixels=True),
        "`normalize_pixels` has no effect here: it is for ",
    ),
    "idle variance": ("m3i", target(2, sigma2=1.0), "`sigma2` has no effect here: it is for "),
    "no head": ("byol", lambda r: r["targets"][0].pop("head"), "needs a `head`"),
    "unknown head": ("byol", target(0, head="globl"), "no head 'globl'; did you mean 'global'"),
    "idle head": ("byol", section("heads", extra={}), "no target uses head 'extra'"),
    "head on a caption": (
        "m3i",
        lambda r: (r.update(heads={"h": {}}), r["targets"][2].update(head="h")),
        "`head` has no effect on boltzmann",
    ),
    "no predictor": (
        "byol",
        lambda r: r["heads"]["global"].pop("predictor_depth"),
        "predictor_hidden: no effect|predictor",
    ),
    "no prototypes": ("sim_global", lambda r: r["heads"]["prototypes"].pop("prototypes"), "needs `prototypes`"),
    "idle prototypes": ("simclr", lambda r: r["heads"]["global"].update(prototypes=8), "`prototypes` have no effect"),
    "idle queue": ("byol", lambda r: r["heads"]["global"].update(queue=8), "`queue` has no effect"),
    "dense without queue": (
        "densecl",
        lambda r: r["heads"]["dense"].pop("queue"),
        "dense negatives come from a `queue`",
    ),
    "queue and both": ("moco", target(0, candidates="both"), "no effect beside a `queue`"),
    "idle state": (
        "simclr",
        lambda r: r["heads"]["global"].update(state_momentum=0.5),
        "`state_momentum` has no effect",
    ),
    "shared by two kinds": ("densecl", target(1, head="dense"), "all dense or all pooled"),
    "hidden view": (
        "simclr",
        lambda r: r["inputs"][0].update(mask={"ratio": 0.5}),
        "needs an input that shows all of view 1",
    ),
    "own view": ("simsiam", target(0, inputs=["a"]), "an input that shows its own target predicts nothing"),
    "pointwise between views": ("densecl", lambda r: r["targets"][0].pop("match"), "knows its own view alone"),
    "pointwise on a masked input": (
        "autoencoder",
        lambda r: r["inputs"][0].update(mask={"ratio": 0.5}),
        "has no answer for patches that its input hides",
    ),
    "copying": (
        "dense_distillation",
        lambda r: (r.pop("teacher"), r.update(momentum={}), r["targets"][0].update(encoder="momentum")),
        "need only copy its own average",
    ),
    "dense negatives by a transformer": (
        "densecl",
        lambda r: r["decoders"].update(dense={"kind": "transformer"}),
        "the decoder must be pointwise, not transformer",
    ),
    "one of two inputs shows the target": ("simsiam", target(0, inputs=["a", "b"]), "shows its own target"),
    "a queue against the own view": ("moco", lambda r: r["inputs"][0].update(view=1), "need only copy its own average"),
    "dense copy": ("sim", lambda r: r.update(inputs=[{"name": "x", "view": 1}]), "need only copy its own average"),
    "no negative": ("unigrad", target(0, unigrad_lambda=0.0), "keeps nothing apart"),
    "blunt target": ("global_distillation", target(0, target_temperature=0.2), "must be below `temperature`"),
    "blunt assignment": ("sim_global", target(0, target_temperature=1.5), "must be below 1"),
    "no average": ("byol", section("momentum", start=0.0, end=0.0), "would be the model itself"),
    "one prototype": (
        "sim_global",
        lambda r: r["heads"]["prototypes"].update(prototypes=1),
        "all samples would have it",
    ),
    "no teacher": ("dense_distillation", drop("teacher"), "needs a `teacher` section"),
    "idle teacher": ("mae", lambda r: r.update(teacher={"from_pretrained": "x"}), "`teacher` has no effect"),
    "gaussian on negatives": ("simclr", target(0, distribution="gaussian"), "does not go with a gaussian distribution"),
    "idle residual projector": ("byol", section("momentum", projector_depth=2), "no dense momentum target"),
    "idle balance": ("mae", lambda r: r.update(balance={"kind": "gradient_norm"}), "no effect on a single target"),
    "idle balance momentum": ("m3i", lambda r: r.update(balance={"momentum": 0.5}), "no effect on fixed weights"),
    "idle bias": ("clip", target(0, bias=-5.0), "`bias` has no effect here"),
    "idle candidates": ("byol", target(0, candidates="both"), "`candidates` has no effect here"),
    "idle entropy": ("byol", target(0, entropy_weight=2.0), "`entropy_weight` has no effect here"),
    "idle lambda": (
        "m3i",
        target(0, regularizer="stop_gradient", unigrad_lambda=0.1),
        "`unigrad_lambda` has no effect here: it is for `regularizer: unigrad`",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_with_their_reason(fault: str) -> None:
    name, break_it, message = FAULTS[fault]
    recipe = values(name)
    parse_recipe(recipe)
    break_it(recipe)
    with pytest.raises(ConfigError) as caught:
        parse_recipe(recipe)
    text = str(caught.value).replace("\n", " ")
    assert re.search(message, text), text


def test_an_empty_recipe_points_at_the_built_in_ones() -> None:
    with pytest.raises(ConfigError, match="no recipe") as caught:
        parse_recipe({})
    assert "extends: m3i" in str(caught.value)


def test_all_faults_are_told_at_once() -> None:
    recipe = values()
    recipe["targets"][0]["decoder"] = "nope"
    recipe["targets"][2]["encoder"] = "embedding"
    with pytest.raises(ConfigError) as caught:
        parse_recipe(recipe)
    assert "no decoder 'nope'" in str(caught.value)
    assert "no such encoder (text_tower)" in str(caught.value)
