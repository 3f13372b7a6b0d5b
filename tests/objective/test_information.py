"""The weighted sum of −log P̂: what it depends on, what it leaves out, and what it reports."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from detectors import BACKBONES, small_spec
from tiny import MAPS, MULTI_CROP, RECIPES, first_weights, part, random_batch, tiny_objective

from m3i_scale.config import RunConfig
from m3i_scale.data.batch import synthetic_batch
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective
from m3i_scale.objective.schedule import settled, value_at
from m3i_scale.objective.targets.base import Context


def encode(objective: Objective, batch) -> Context:
    return objective._encode(batch)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_is_the_weighted_sum_of_its_groups(recipe: str) -> None:
    objective = tiny_objective(recipe, "recipe.targets.0.weight=0.25")
    loss, figures = objective(random_batch(6))
    wanted = sum(value_at(target.weight, 0.0) * figures[f"{target.name}/loss"] for target in objective.recipe.targets)
    torch.testing.assert_close(loss.detach(), wanted)
    assert not any(value.requires_grad for value in figures.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_batch_gives_the_same_loss(recipe: str) -> None:
    objective, batch = tiny_objective(recipe).eval(), random_batch(6)  # heads remember training batches
    assert torch.equal(objective(batch)[0], objective(batch)[0])


# ---------------------------------------------------------------- attention between the images of a mix


def test_own_attention_does_not_leak_the_other_image() -> None:
    objective, batch = tiny_objective("m3i"), random_batch(4)
    before = encode(objective, batch).inputs
    batch.images_VBCHW[:, 1] = 255 - batch.images_VBCHW[:, 1]
    after = encode(objective, batch).inputs
    for name in ("a", "b"):
        assert not torch.allclose(after[name][0].tokens_BLD[1], before[name][0].tokens_BLD[1], atol=1e-3)
        for image in (0, 2, 3):
            torch.testing.assert_close(after[name][0].tokens_BLD[image], before[name][0].tokens_BLD[image])
            torch.testing.assert_close(after[name][0].cls_BND[image], before[name][0].cls_BND[image])


def test_mixed_attention_sees_the_partner_and_only_the_partner() -> None:
    objective, batch = tiny_objective("m3i", "backbone.attention=across_images"), random_batch(4)
    own = tiny_objective("m3i")
    before = encode(objective, batch).inputs
    for name in ("a", "b"):
        assert before[name][0].tokens_BLD.shape == encode(own, batch).inputs[name][0].tokens_BLD.shape
        assert not torch.allclose(before[name][0].tokens_BLD, encode(own, batch).inputs[name][0].tokens_BLD, atol=1e-3)
    batch.images_VBCHW[:, 1] = 255 - batch.images_VBCHW[:, 1]
    after = encode(objective, batch).inputs
    for name in ("a", "b"):
        # 1 mixes with 0.
        assert not torch.allclose(after[name][0].tokens_BLD[0], before[name][0].tokens_BLD[0], atol=1e-5)
        for image in (2, 3):
            torch.testing.assert_close(after[name][0].tokens_BLD[image], before[name][0].tokens_BLD[image])


def test_a_mixed_row_is_one_sequence_through_the_backbone() -> None:
    """Row i of the mix, put together by hand, and read back by image."""
    objective, batch = tiny_objective("m3i", "backbone.attention=across_images"), random_batch(2)
    context = encode(objective, batch)
    (a,), (b,) = context.inputs["a"], context.inputs["b"]
    cls1, tokens1 = objective.student.embed(context.views[1])
    _, tokens2 = objective.student.embed(context.views[2])
    for row in range(2):
        image_a, image_b = int(a.where.image_of_row_B[row]), int(b.where.image_of_row_B[row])
        assert {image_a, image_b} == {0, 1}
        shown_a = tokens1[image_a, a.where.visible_BL[image_a]]
        shown_b = tokens2[image_b, b.where.visible_BL[image_b]]
        sequence = torch.cat([cls1[row], shown_a, shown_b])[None]
        encoded = objective.student.encode(sequence)[0]
        torch.testing.assert_close(a.tokens_BLD[image_a], encoded[1 : 1 + len(shown_a)], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(b.tokens_BLD[image_b], encoded[1 + len(shown_a) :], atol=1e-5, rtol=1e-5)


def test_own_attention_is_the_backbone_on_the_visible_tokens_of_each_image() -> None:
    objective, batch = tiny_objective("m3i"), random_batch(3)
    context = encode(objective, batch)
    for name, view in (("a", 1), ("b", 2)):
        cls, tokens = objective.student.embed(context.views[view])
        (found,) = context.inputs[name]
        for image in range(3):
            shown = tokens[image, found.where.visible_BL[image]]
            encoded = objective.student.encode(torch.cat([cls[image], shown])[None])[0]
            torch.testing.assert_close(found.tokens_BLD[image], encoded[1:], atol=1e-5, rtol=1e-5)


def test_the_token_count_is_what_the_backbone_sees() -> None:
    for recipe, tokens in (("m3i", 16), ("mae", 4), ("clip", 16), ("sim", 16 - 10)):
        objective = tiny_objective(recipe)
        objective(random_batch(4))
        assert objective.token_count == 4 * tokens


# ---------------------------------------------------------------- samples that lack a target


@pytest.mark.parametrize(("group", "lacks"), [("text", {"text": False}), ("category", {"labels": False})])
def test_a_batch_in_which_nobody_has_a_target_gives_zero_and_zero_gradients(group: str, lacks: dict[str, bool]) -> None:
    objective = tiny_objective("m3i")
    loss, figures = objective(random_batch(4, **lacks))
    loss.backward()
    assert torch.isfinite(loss)
    assert float(figures[f"{group}/loss"]) == float(figures[f"{group}/nats"]) == 0
    assert sum(float(value) for value in objective.squared_grad_norms[group]) == 0
    modules = [objective.heads[group]] + ([objective.text] if group == "text" else [])
    for module in modules:
        for parameter in module.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
    other = "category" if group == "text" else "text"
    assert any(parameter.grad.any() for parameter in objective.heads[other].parameters())


def test_a_category_loss_is_the_mean_over_the_labelled_of_all_label_sets() -> None:
    objective, batch = (
        tiny_objective("supervised", "recipe.targets.0.distribution.label_smoothing=0"),
        random_batch(8, views=1),
    )
    loss, figures = objective(batch)
    logits = objective.embed_images(batch.images_VBCHW[0], "category").split([3, 2], dim=1)
    losses, nats = [], []
    for sample in range(8):
        chosen = int(batch.label_sets_B[sample])
        if chosen < 0:
            continue
        losses.append(F.cross_entropy(logits[chosen][sample], batch.labels_B[sample]))
        nats.append(math.log((3, 2)[chosen]) - losses[-1])
    assert len(losses) == 6
    torch.testing.assert_close(loss.detach(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(figures["category/nats"], torch.stack(nats).mean(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- dense targets


def dense_by_hand(objective: Objective, batch, name: str) -> torch.Tensor:
    """‖ẑ − z̄‖² over the asked patches plus λ ẑᵀ C ẑ / D, target by the stock model."""
    target = next(item for item in objective.recipe.targets if item.name == name)
    predictions = []
    hook = objective.heads[name].register_forward_hook(lambda module, inputs, output: predictions.append(output))
    objective(batch)
    hook.remove()
    view = target.view - 1
    pixels = objective.pixel_norm(batch.images_VBCHW[view])
    hidden = objective.momentum.backbone.model(pixel_values=pixels).last_hidden_state[:, 1:]
    z = F.layer_norm(objective.momentum.projector(hidden), (64,), eps=1e-5)
    where = encode(objective, batch).inputs[target.inputs[0]][0].where
    asked = z if target.tokens == "all" else torch.stack([z[i, where.hidden_BM[i]] for i in range(len(batch))])
    error = (predictions[0] - asked).square().mean()
    flat = z.flatten(0, 1)
    p = predictions[0].flatten(0, 1)
    matrix = p @ (flat.T @ flat / len(flat)) @ p.T
    return error + 0.02 * matrix.diagonal().mean() / 64


@pytest.mark.parametrize(("recipe", "name"), [("m3i", "intra"), ("m3i", "inter")])
def test_dense_groups_are_the_published_loss(recipe: str, name: str) -> None:
    objective, batch = tiny_objective(recipe).eval(), random_batch(4)
    _, figures = objective(batch)
    wanted = dense_by_hand(objective, batch, name)
    torch.testing.assert_close(figures[f"{name}/loss"], wanted.detach(), rtol=1e-5, atol=1e-6)


def test_intra_reads_view_1_and_inter_reads_both_views() -> None:
    objective, batch = tiny_objective("m3i"), random_batch(4)
    _, before = objective(batch)
    batch.images_VBCHW[1] = 255 - batch.images_VBCHW[1]
    _, after = objective(batch)
    torch.testing.assert_close(after["intra/loss"], before["intra/loss"])
    assert not torch.equal(after["inter/loss"], before["inter/loss"])  # weak at first weights, and never nothing


def test_the_geometry_matters_between_views_and_not_within_one() -> None:
    objective, batch = tiny_objective("m3i"), random_batch(4)
    _, before = objective(batch)
    batch.crops_VB4[0, :, :2] += 5.0
    _, after = objective(batch)
    torch.testing.assert_close(after["intra/loss"], before["intra/loss"])
    assert not torch.equal(after["inter/loss"], before["inter/loss"])


# ---------------------------------------------------------------- what is watched


SEVERAL_LAYERS = "recipe.decoders.pool={kind: class_token, blocks: 2, mean: true}"


@pytest.mark.parametrize(("recipe", "overrides"), [*((name, ()) for name in RECIPES), ("clip", (SEVERAL_LAYERS,))])
def test_group_gradient_norms_are_those_of_autograd(recipe: str, overrides: tuple[str, ...]) -> None:
    objective, batch = tiny_objective(recipe, "recipe.targets.0.weight=2.5", *overrides), random_batch(8)
    with torch.no_grad():
        for parameter in objective.student.parameters():  # where it starts, an anchor pulls nowhere
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01)
    objective(random_batch(6, seed=1))  # fills what heads remember
    objective.eval()
    objective.progress = 0.9  # all groups of a schedule count
    kept = []
    real = objective._encode
    objective._encode = lambda given, *_, **__: kept.append(real(given)) or kept[-1]  # type: ignore[method-assign,func-returns-value]
    loss, _ = objective(batch)
    context = kept[0]
    loss.backward()
    found = {name: torch.stack(values).sum().sqrt() for name, values in objective.squared_grad_norms.items()}

    context = real(batch)
    for target in (settled(described, objective.progress) for described in objective.recipe.targets):
        given = objective.target_modules(target, objective.student.grid)
        by_input = [target.loss(given, context, part).value for part in target.sources(context)]
        loss = value_at(target.weight, 0.9) * torch.stack(by_input).mean()
        encoded = [one for parts in context.inputs.values() for one in parts]
        parts = [part for one in encoded for part in (one.cls_BND, one.tokens_BLD)]
        gradients = torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True)
        wanted = torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt()
        torch.testing.assert_close(found[target.name], wanted, rtol=1e-4, atol=1e-7)
        assert float(wanted) > 0


def test_pairs_of_one_input_are_those_of_an_input_a_view() -> None:
    batch, fields = random_batch(5), ("inputs=[g]", "pairs=other")
    one_input = (
        "recipe.inputs=[{name: g, view: 1, views: 2}]",
        *(f"recipe.targets.{number}.{field}" for number in (0, 1) for field in fields),
    )
    wanted, found = (tiny_objective("global_distillation", *given)(batch) for given in ((), one_input))
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        torch.testing.assert_close(found[1][name], value)


def test_a_group_is_the_mean_over_its_pairs_and_small_views_are_among_them() -> None:
    objective, batch = tiny_objective("global_distillation", *MULTI_CROP).eval(), random_batch(6)
    context = encode(objective, batch)
    assert [len(context.inputs[name]) for name in ("large", "small")] == [2, 2]
    _, figures = objective(batch)
    for target in objective.recipe.targets:
        given = objective.target_modules(target, objective.student.grid)
        losses = [
            target.loss(given, context, part).value
            for parts in context.inputs.values()
            for part in parts
            if part.where.view != target.view - 1
        ]
        assert len(losses) == 3
        torch.testing.assert_close(figures[f"{target.name}/loss"], torch.stack(losses).mean())
    before = figures["view1/loss"]
    batch.small_VBCHW[:2] = 255 - batch.small_VBCHW[:2]
    assert not torch.allclose(objective(batch)[1]["view1/loss"], before)


def test_what_a_mask_token_stands_for_reaches_nothing() -> None:
    objective, batch = tiny_objective("global_distillation", *MULTI_CROP).eval(), random_batch(6)
    before, hidden = encode(objective, batch).inputs["large"], 0
    for one in before:
        assert one.where.shown_BN is not None
        pixels = (~one.where.shown_BN).view(6, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        hidden += int(pixels.sum())
        images = batch.images_VBCHW[one.where.view]
        images.copy_(torch.where(pixels, 255 - images, images))
    assert hidden > 0
    for after, one in zip(encode(objective, batch).inputs["large"], before, strict=True):
        torch.testing.assert_close(after.tokens_BLD, one.tokens_BLD)


@pytest.mark.parametrize(
    ("backbone", "views", "where"),
    [
        ((), "[{count: 2}, {count: 2, size: 32}]", "recipe.views.1.size"),
        ((), "[{count: 2}, {count: 2, size: 12}]", "recipe.views.1.size"),
        ((*MAPS, "recipe.decoders.pool={kind: mean_pool}"), "[{count: 2}, {count: 2, size: 32}]", "recipe.views"),
    ],
    ids=["not smaller", "no multiple of the patch", "maps"],
)
def test_views_that_the_backbone_cannot_take_are_refused(backbone: tuple[str, ...], views: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_objective("global_distillation", *MULTI_CROP, *backbone, f"recipe.views={views}")
    assert caught.value.where == where


def test_a_convolutional_backbone_refuses_mask_tokens() -> None:
    mask = "recipe.inputs=[{name: x, view: 1, mask: {ratio: 0.5, masked: mask_token}}]"
    with pytest.raises(ConfigError) as caught:
        tiny_objective("mae", *MAPS, mask)
    assert caught.value.where == "recipe.inputs"


def test_boltzmann_groups_report_log_k_minus_loss() -> None:
    objective, batch = tiny_objective("m3i"), random_batch(6)
    _, figures = objective(batch)
    assert int(batch.has_text_B.sum()) == 4
    torch.testing.assert_close(figures["text/nats"], math.log(4) - figures["text/loss"])
    assert "intra/nats" not in figures


def test_health_is_measured_on_request() -> None:
    objective, batch = tiny_objective("m3i"), random_batch(4)
    assert not any(name.startswith("health/") for name in objective(batch)[1])
    objective.measure_health = True
    figures = objective(batch)[1] | objective.host_figures.copy()()
    assert {"intra/nats", "inter/nats"} <= figures.keys()
    assert objective.host_figures.copy()() == {}
    watched = {name for name in figures if name.startswith("health/")}
    features = {f"{what}_{figure}" for what in ("dense", "pooled", "target_view1") for figure in ("std", "rank")}
    targets = {"intra_spread", "inter_spread", "text_spread", "text_scale"}
    assert watched == {f"health/{name}" for name in features | targets}
    assert float(figures["health/text_scale"]) == pytest.approx(1 / 0.07, rel=1e-4)
    assert all(0 < float(figures[f"health/{name}_spread"]) < 1 for name in ("intra", "inter", "text"))
    assert all(math.isfinite(float(figures[name])) for name in watched)


@pytest.mark.parametrize("backbone", ["vit", "internimage"])
def test_the_health_of_a_detector_is_its_backbones(backbone: str) -> None:
    task = {"kind": "detection", "head": {"kind": "mask_rcnn", **small_spec(backbone).model_dump(exclude={"kind"})}}
    run = RunConfig.model_validate({"task": task, "backbone": BACKBONES[backbone]})
    objective = build_objective(run, {"set": ["a", "b"]}, None)
    first_weights(objective, 0)
    objective.measure_health = True
    batch = synthetic_batch(2, 1, image=64, tokens=1, classes=2, vocabulary=10, reads="boxes_and_masks")

    def health() -> dict[str, float]:
        objective(batch)
        return objective.host_figures.copy()()

    before = health()
    assert set(before) == {f"health/{what}_{figure}" for what in ("dense", "pooled") for figure in ("std", "rank")}
    assert objective.token_count == 2 * objective.student.grid[0] ** 2
    for parameter in objective.reader.pyramid.parameters():
        parameter.data.mul_(3)
    assert health() == before
    for parameter in objective.student.parameters():
        parameter.data.mul_(3)
    assert health() != before


# ---------------------------------------------------------------- inference


def test_embeddings_are_those_that_training_compares() -> None:
    objective, batch = tiny_objective("clip"), random_batch(4, views=1)
    batch.has_text_B[:] = True
    batch.captions_B = torch.arange(1, 5)
    image = objective.embed_images(batch.images_VBCHW[0], "text")
    text = objective.embed_text(batch.text_ids_BT, batch.text_mask_BT)
    logits = objective.heads["text"].log_scale.exp() * image @ text.T
    labels = torch.arange(4)
    wanted = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(objective(batch)[0], wanted)


def test_images_of_a_category_target_give_the_logits_of_all_sets() -> None:
    logits = tiny_objective("m3i").embed_images(random_batch(3).images_VBCHW[0], "category")
    assert logits.shape == (3, 5)
    assert not logits.requires_grad


def test_a_sample_does_not_depend_on_its_neighbours_except_as_negatives() -> None:
    objective, batch = tiny_objective("mae"), random_batch(6, views=1)
    losses = [objective(part(batch, i, i + 1))[0].detach() for i in range(6)]
    torch.testing.assert_close(objective(batch)[0].detach(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
