"""Recipes: the built-in ones hold together, and every fault is refused with its reason."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from tiny import MULTI_CROP

from m3i_scale.config import known_recipes, load_run
from m3i_scale.errors import ConfigError
from m3i_scale.objective.recipe import meaning, parse_recipe


def values(name: str = "m3i") -> dict[str, Any]:
    return copy.deepcopy(load_run(name).recipe)


@pytest.mark.parametrize("name", known_recipes())
def test_built_in_recipes_hold_together_and_describe_themselves(name: str) -> None:
    recipe = parse_recipe(values(name))
    told = recipe.summary()
    assert told["name"] == name
    assert [target["name"] for target in told["targets"]] == [target.name for target in recipe.targets]
    assert all(entry["mixed"] == (recipe.mix is not None) for entry in told["inputs"])


def test_the_all_in_one_recipe_is_that_of_the_paper() -> None:
    recipe = parse_recipe(values())
    assert (recipe.view_count, recipe.uses_text, recipe.uses_categories, recipe.ema is not None) == (
        2,
        True,
        True,
        True,
    )
    intra, inter, text, category = recipe.targets
    assert recipe.input(intra.inputs[0]).view == intra.view  # the same view
    assert recipe.input(inter.inputs[0]).view != inter.view  # a different view
    assert text.inputs == category.inputs == ["a", "b"]
    assert recipe.summary()["inputs"][0]["mask"] == "random, complementary"


def test_what_the_other_recipes_need() -> None:
    needs = {
        name: (recipe.view_count, recipe.uses_text, recipe.uses_categories, recipe.ema is not None)
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


def small_input(recipe: dict[str, Any], **fields: Any) -> None:
    """Add an input of small views to a recipe of two views, and have the last target predicted from it."""
    recipe.setdefault("views", [{"count": 2}, {"count": fields.get("views", 1), "size": 96}])
    recipe["inputs"].append({"name": "small", "view": 3, **fields})
    recipe["targets"][-1]["inputs"] = [*recipe["targets"][-1]["inputs"], "small"]


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
    "mix by target blocks": (
        "m3i",
        section("mix", form={"kind": "target_blocks", "blocks": 2, "scale": 0.2}),
        "form: random, block or inverse_block",
    ),
    "EMA decay of zero": ("m3i", section("ema", start=0.0, end=0.0), "ema.end"),
    "mix of one": ("m3i", section("mix", inputs=["a"]), "mix.inputs"),
    "mask inside a mix": ("m3i", lambda r: r["inputs"][0].update(mask={"ratio": 0.5}), "have no mask of their own"),
    "gap in the views": (
        "m3i",
        lambda r: r["inputs"][1].update(view=3),
        "without gaps, but nothing has view 2: input 'b' has view 3",
    ),
    "a target's view out of reach": ("m3i", target(0, view=7), "nothing has view 3: target 'intra' has view 7"),
    "idle ema": ("mae", lambda r: r.update(ema={}), "`ema` has no effect"),
    "missing ema": ("sim", drop("ema"), "needs an `ema` section"),
    "wrong encoder": ("m3i", target(2, encoder="embedding"), r"recipe\.targets\.2\.encoder.*text_tower"),
    "wrong distribution": (
        "m3i",
        target(0, distribution="boltzmann"),
        "no such kind: 'boltzmann'.*gaussian",
    ),
    "clusters of what the input shows": (
        "capi",
        lambda r: (r["inputs"][0].pop("mask"), r["targets"][0].update(tokens="all")),
        "need only copy its own average",
    ),
    "clusters of one kind": ("capi", target(0, clusters=1), "clusters"),
    "clusters that nothing keeps apart": (
        "capi",
        target(0, regularizer="centering"),
        r"recipe\.targets\.0\.regularizer.*no such kind: 'centering'.*sinkhorn",
    ),
    "no kind": ("m3i", lambda r: r["targets"][0].pop("kind"), "there is no `kind`.*dense"),
    "misspelt kind": ("m3i", target(0, kind="dens"), "no such kind: 'dens'.*did you mean 'dense'"),
    "misspelt regularizer": ("m3i", target(0, regularizer="unigard"), "no such kind.*did you mean 'unigrad'"),
    "unknown key of a regularizer": (
        "m3i",
        target(0, regularizer={"kind": "unigrad", "strenght": 1}),
        r"unknown key 'recipe.targets.0.regularizer.strenght'.*did you mean 'strength'",
    ),
    "regularizer of another kind of target": ("m3i", target(0, regularizer="centering"), "no such kind: 'centering'"),
    "wrong decoder kind": ("m3i", target(0, decoder="pool"), "decoded by transformer or .*pointwise.*, not mean_pool"),
    "siamese decoder without its projector": (
        "sim",
        lambda r: r.update(ema={"start": 0.995}),
        "needs `ema.projector: transformer`",
    ),
    "dense decoder for text": (
        "m3i",
        target(2, decoder="dense"),
        "decoded by .*attention_pool.*, not transformer",
    ),
    "layers of a view among several": (
        "global_distillation",
        lambda r: r["decoders"]["pool"].update(blocks=2),
        "decoder 'pool': more than the class token is read of the only input",
    ),
    "no collapse control": (
        "m3i",
        target(0, regularizer="none"),
        "'none' does not keep a dense target .* from collapsing.*valid: stop_gradient, unigrad",
    ),
    "idle regularizer": ("mae", target(0, regularizer="unigrad"), "has no effect on it; valid: none"),
    "view on text": ("m3i", target(2, view=1), "unknown key 'recipe.targets.2.view'"),
    "dense without view": ("m3i", lambda r: r["targets"][0].pop("view"), "'recipe.targets.0.view' is missing"),
    "masked between views": ("m3i", target(1, tokens="masked"), "use `all` between views"),
    "masked without mask": ("mae", lambda r: r["inputs"][0].pop("mask"), "the input hides no patch"),
    "blocks without blocks": (
        "ijepa",
        lambda r: r["inputs"][0].update(mask={"ratio": 0.7}),
        "`tokens: blocks`, but the input has no target blocks",
    ),
    "blocks between views": (
        "ijepa",
        lambda r: (r["inputs"][0].update(view=2), r["decoders"]["predictor"].update(position="relative")),
        "use `all` between views",
    ),
    "blocks at once": (
        "ijepa",
        lambda r: r.update(decoders={"predictor": {"kind": "convolution"}}),
        "use a transformer, not convolution",
    ),
    "blocks larger than what is hidden": (
        "ijepa",
        lambda r: r["inputs"][0]["mask"].update(ratio=0.6),
        "may cover 0.7 of the patches, and 0.6 are masked",
    ),
    "blocks that are seen": (
        "ijepa",
        lambda r: r["inputs"][0]["mask"].update(masked="mask_token"),
        "does not see the target blocks",
    ),
    "no aspect": (
        "ijepa",
        lambda r: r["inputs"][0]["mask"]["form"].update(aspect=[1.5, 0.75]),
        r"\[smallest, largest\] height over width",
    ),
    "convolution between views": (
        "data2vec2",
        lambda r: (r["inputs"][0].update(view=2), target(0, tokens="all")(r)),
        "a convolution knows its own view alone",
    ),
    "kernel without center": ("data2vec2", lambda r: r["decoders"]["dense"].update(kernel=4), "an odd number"),
    "layers of a teacher": ("dense_distillation", target(0, layers=4), "not with `encoder: teacher`"),
    "layers of pixels": ("mae", target(0, layers=4), "not with `encoder: patchify`"),
    "absolute between views": ("sim", lambda r: r["decoders"]["dense"].update(position="absolute"), "relative"),
    "idle field of a target": ("m3i", target(3, width=64), "unknown key 'recipe.targets.3.width'"),
    "idle field of a distribution": (
        "siglip",
        target(0, distribution={"kind": "bernoulli", "direction": "forward"}),
        "unknown key 'recipe.targets.0.distribution.direction'",
    ),
    "no negative": ("unigrad", target(0, regularizer={"kind": "unigrad", "strength": 0}), "strength.*greater than 0"),
    "two memories": (
        "unigrad",
        target(0, regularizer={"kind": "unigrad", "momentum": 0.5}),
        "one regularizer that remembers alike",
    ),
    "idle queue": (
        "byol",
        target(0, regularizer={"kind": "stop_gradient", "size": 8}),
        "unknown key 'recipe.targets.0.regularizer.size'",
    ),
    "idle momentum of a regularizer": (
        "simclr",
        target(0, regularizer={"kind": "negatives", "momentum": 0.5}),
        "unknown key 'recipe.targets.0.regularizer.momentum'",
    ),
    "queue among predictions too": (
        "moco",
        target(0, regularizer={"kind": "queued_negatives", "size": 8, "candidates": "both"}),
        "unknown key 'recipe.targets.0.regularizer.candidates'",
    ),
    "head on a caption": (
        "m3i",
        lambda r: (r.update(heads={"h": {}}), r["targets"][2].update(head="h")),
        "unknown key 'recipe.targets.2.head'",
    ),
    "no head": ("byol", lambda r: r["targets"][0].pop("head"), "'recipe.targets.0.head' is missing"),
    "unknown head": ("byol", target(0, head="globl"), "no head 'globl'; did you mean 'global'"),
    "idle head": ("byol", section("heads", extra={}), "no target uses head 'extra'"),
    "no predictor": (
        "byol",
        lambda r: r["heads"]["global"].pop("predictor_depth"),
        "give its head a predictor",
    ),
    "no prototypes": ("sim_global", lambda r: r["heads"]["prototypes"].pop("prototypes"), "needs `prototypes`"),
    "one prototype": ("sim_global", lambda r: r["heads"]["prototypes"].update(prototypes=1), "at least 2"),
    "idle prototypes": (
        "simclr",
        lambda r: r["heads"]["global"].update(prototypes=8),
        "`prototypes` of head .* have no effect",
    ),
    "dense without queue": (
        "densecl",
        target(0, regularizer="negatives"),
        "no such kind: 'negatives'.*queued_negatives",
    ),
    "shared by two kinds": ("densecl", target(1, head="dense"), "that share it .* need one kind"),
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
        "has no answer for masked patches",
    ),
    "copying": (
        "dense_distillation",
        lambda r: (r.pop("teachers"), r.update(ema={}), r["targets"][0].update(encoder="ema")),
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
    "blunt target": (
        "global_distillation",
        target(0, regularizer={"kind": "centering", "target_temperature": 0.2}),
        "must be below `temperature`",
    ),
    "target that becomes blunt": (
        "ibot",
        target(2, regularizer={"kind": "centering", "target_temperature": [[0, 0.04], [0.5, 0.1]]}),
        "must be below `temperature`",
    ),
    "prediction that becomes as sharp as its target": (
        "dinov2",
        target(0, distribution={"kind": "boltzmann", "temperature": [[0, 0.1], [0.5, 0.04]]}),
        "must be below `temperature`",
    ),
    "assignment beyond fp32": (
        "dinov2",
        target(0, regularizer={"kind": "sinkhorn", "target_temperature": 0.01}),
        "0.025 or more",
    ),
    "schedule that begins late": (
        "ibot",
        target(0, regularizer={"kind": "centering", "target_temperature": [[0.1, 0.04], [0.5, 0.07]]}),
        r"'recipe.targets.0.regularizer.target_temperature': a schedule is two or more .* this is at \[0.1, 0.5\]",
    ),
    "temperature of a schedule that is 0": (
        "ibot",
        target(0, regularizer={"kind": "centering", "target_temperature": [[0, 0.0], [0.5, 0.07]]}),
        "target_temperature.*greater than 0",
    ),
    "weight that is always 0": ("ibot", target(0, weight=[[0, 0], [1, 0]]), "weight.*leave the target out"),
    "whole views without prototypes": (
        "ibot",
        lambda r: r["heads"]["prototypes"].pop("prototypes"),
        "needs `prototypes` in head",
    ),
    "prototypes of patches by a transformer": (
        "dinov2",
        lambda r: r["decoders"].update(dense={"kind": "transformer"}),
        "the decoder must be pointwise, not transformer",
    ),
    "prototypes of hidden patches that are dropped": (
        "ibot",
        lambda r: r["inputs"][0].update(mask={"form": "block", "ratio": 0.5}),
        "or `masked: mask_token`",
    ),
    "negatives of prototypes": (
        "dinov2",
        target(2, regularizer="negatives"),
        "no such kind: 'negatives'.*centering, mean_entropy, sinkhorn",
    ),
    "two memories of patches": (
        "ibot",
        target(2, regularizer={"kind": "sinkhorn"}),
        "one regularizer that remembers alike",
    ),
    "head on a spread": ("dinov2", target(4, head="global"), "unknown key 'recipe.targets.4.head'"),
    "blunt assignment": (
        "sim_global",
        target(0, regularizer={"kind": "mean_entropy", "target_temperature": 1.5}),
        "target_temperature.*less than 1",
    ),
    "no teacher": ("dense_distillation", drop("teachers"), "no teacher 'teacher'; set one, e.g. recipe.teachers"),
    "unknown teacher": ("multi_teacher", target(0, teacher="dino"), "no teacher 'dino'; did you mean 'dinov2'"),
    "idle teacher": (
        "mae",
        lambda r: r.update(teachers={"one": {"from_pretrained": "x"}}),
        "teacher 'one' has no effect",
    ),
    "one teacher too many": (
        "dense_distillation",
        lambda r: r["teachers"].update(clip={"from_pretrained": "x"}),
        "teacher 'clip' has no effect",
    ),
    "gaussian on negatives": ("simclr", target(0, distribution="gaussian"), "does not go with a gaussian distribution"),
    "idle balance": ("mae", lambda r: r.update(balance={"kind": "gradient_norm"}), "no effect on a single target"),
    "no view of that number": (
        "mae",
        lambda r: r.update(views=[{"count": 2}]),
        "`views` are 2: nothing has view 2",
    ),
    "too few views": ("sim", lambda r: r.update(views=[{}]), "`views` are 1: .*view 2"),
    "small view first": (
        "global_distillation",
        lambda r: r.update(views=[{"size": 96}, {}]),
        "the last of them may have one other `size`",
    ),
    "two small sizes": (
        "global_distillation",
        lambda r: (r.update(views=[{"count": 2}, {"size": 96}, {"size": 64}]), small_input(r, views=2)),
        "the last of them may have one other `size`",
    ),
    "only small views": ("mae", lambda r: r.update(views=[{"size": 96}]), "the last of them may have one other `size`"),
    "mask on a small view": (
        "global_distillation",
        lambda r: small_input(r, mask={"ratio": 0.5}),
        "a small view is shown whole",
    ),
    "small target": (
        "global_distillation",
        lambda r: (small_input(r), r["targets"][0].update(view=3)),
        "targets lie in views of the backbone's size",
    ),
    "patches from a small view": (
        "sim",
        small_input,
        "small views predict targets of the whole view alone",
    ),
    "mix of several views": ("m3i", lambda r: r["inputs"][0].update(views=2), "inputs of a mix are of one view each"),
    "no pairs": ("global_distillation", target(0, pairs="own"), "`pairs: own` leaves nothing"),
    "own view among several": (
        "simsiam",
        lambda r: (r["inputs"][1].update(view=1, views=2), r["inputs"].pop(0), target(1, inputs=["b"])(r)),
        "an input that shows its own target predicts nothing",
    ),
    "hidden patches of other views": (
        "masked_features",
        lambda r: r["inputs"][0].update(views=2),
        "`tokens: masked` counts the hidden patches of the input's own view",
    ),
    "uneven masks under a density": (
        "mae",
        lambda r: r["inputs"][0].update(mask={"ratio": [0.1, 0.5], "masked": "mask_token"}),
        "counts as many hidden patches of every sample",
    ),
    "anchor behind a transformer": (
        "continue_images",
        target(1, decoder="dense"),
        "the decoder must be pointwise, not transformer",
    ),
    "anchor of a pooled image": (
        "continue_siglip",
        target(1, decoder="pool"),
        "an anchor target is decoded by .*pointwise.*, not map_head",
    ),
    "anchor in another view": (
        "continue_m3i",
        target(4, inputs=["b"]),
        "inputs of view 1, or `pairs: own`",
    ),
    "anchor on an average": ("continue_m3i", target(4, encoder="ema"), "targets.4.encoder.*'teacher'"),
    "anchor on the backbone itself": ("continue_images", target(2, encoder="online"), "'ema' or 'teacher'"),
    "anchor without a start": (
        "continue_images",
        lambda r: r["teachers"].update(other=r["teachers"].pop("start")),
        "no teacher 'start'",
    ),
    "UniGrad on similarities": (
        "continue_images",
        target(2, regularizer="unigrad"),
        "no such kind: 'unigrad'.*stop_gradient",
    ),
    "similarities with the tails of a Laplace distribution": (
        "continue_images",
        target(2, distribution="smooth_l1"),
        "no such kind: 'smooth_l1'.*gaussian",
    ),
    "similarities of patches that are asked for": (
        "continue_images",
        target(2, tokens="masked"),
        "unknown key 'recipe.targets.2.tokens'",
    ),
    "similarities of the average to all of the view": (
        "continue_siglip",
        lambda r: (
            r.update(ema={}),
            r["targets"].append({**r["targets"][1], "name": "gram", "kind": "gram", "encoder": "ema"}),
            r["targets"][2].pop("teacher"),
        ),
        "need only copy its own average",
    ),
    "similarities of an average alone": (
        "continue_images",
        lambda r: (
            r.pop("teachers"),
            r["decoders"].pop("dense"),
            r.update(targets=[{**r["targets"][2], "encoder": "ema"}], ema={}),
            r["targets"][0].pop("teacher"),
        ),
        "nothing keeps 'gram' from collapsing",
    ),
    "idle balance momentum": (
        "m3i",
        lambda r: r.update(balance={"kind": "fixed", "momentum": 0.5}),
        "unknown key 'recipe.balance.momentum'",
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


def test_views_by_role_are_counted_and_some_are_small() -> None:
    recipe = parse_recipe(
        load_run("global_distillation", list(MULTI_CROP)).recipe | {"views": [{"count": 2}, {"count": 2, "size": 96}]}
    )
    assert recipe.view_count == 4
    assert [recipe.is_small(view) for view in (1, 2, 3, 4)] == [False, False, True, True]
    assert [recipe.shows(view) for view in (1, 3, 4)] == [None, "small", "small"]
    assert recipe.uses_mask_tokens
    seen = [view for _, view in recipe.image_targets[0].predicted_from(recipe)]
    assert sorted(seen) == [2, 3, 4]


def test_an_empty_recipe_points_at_the_built_in_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({})
    assert caught.value.where == "recipe"
    assert "extends: m3i" in str(caught.value)


def test_all_faults_are_told_at_once() -> None:
    recipe = values()
    recipe["targets"][0]["decoder"] = "nope"
    recipe["targets"][2]["decoder"] = "dense"
    with pytest.raises(ConfigError) as caught:
        parse_recipe(recipe)
    assert "no decoder 'nope'" in str(caught.value)
    assert "target 'text'" in str(caught.value)


def test_what_no_memory_depends_on_may_differ_between_targets_of_a_head() -> None:
    for name, override in (("unigrad", "regularizer.strength=0.5"), ("simclr", "regularizer.candidates=target")):
        one, other = parse_recipe(load_run(name, [f"recipe.targets.0.{override}"]).recipe).targets
        assert one.regularizer != other.regularizer


def test_the_meaning_of_a_recipe_leaves_out_where_a_teacher_lies() -> None:
    here, there = values("dense_distillation"), values("dense_distillation")
    here["teachers"]["teacher"]["from_pretrained"] = "/elsewhere"
    assert meaning(here) == meaning(there)
    several = values("multi_teacher")
    several["targets"][0]["teacher"] = "dinov2"
    assert meaning(several) != meaning(values("multi_teacher"))
    assert meaning(here) != meaning(values("sim"))
