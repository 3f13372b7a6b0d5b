"""Targets that keep patches near what another encoder makes of them; the teacher that the student starts from."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LABEL_SETS, MAPS, VOCABULARY, random_batch, tiny_objective, tiny_run, tiny_start, tiny_teacher
from torch import Tensor
from transformers import ViTModel
from weights import timm_model

from m3i_scale.backbones.internimage import InternImageModel
from m3i_scale.config import RunConfig
from m3i_scale.errors import ConfigError
from m3i_scale.exports.write import inference_names, portable_run
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.decoders import Pointwise
from m3i_scale.objective.information import Objective
from m3i_scale.objective.inputs import EncodedInput, normalize
from m3i_scale.objective.pretrained import start_weights
from m3i_scale.objective.ranks import SingleProcess
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.objective.targets.base import Context, Encoded, TargetModules
from m3i_scale.objective.targets.patches import Anchor, Gram, ShownPatches
from m3i_scale.objective.teacher import teachers_sha256

IMAGES, PATCHES, SHOWN, WIDTH = 3, 9, 5, 6
TARGET: dict[str, Any] = {"inputs": ["x"], "view": 1, "decoder": "patches"}
ANCHOR = TARGET | {"name": "anchor", "kind": "anchor", "teacher": "start"}
GRAM = TARGET | {"name": "gram", "kind": "gram", "encoder": "teacher", "teacher": "start"}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_by_pairs(shown_BLD: Tensor, wanted_BLD: Tensor) -> Tensor:
    """Pair by pair."""
    squares = []
    for x_LD, z_LD in zip(shown_BLD, wanted_BLD, strict=True):
        for i in range(len(x_LD)):
            for j in range(len(x_LD)):
                ours, theirs = (
                    (rows[i] @ rows[j]) / (rows[i] @ rows[i]).sqrt() / (rows[j] @ rows[j]).sqrt()
                    for rows in (x_LD, z_LD)
                )
                squares.append((ours - theirs) ** 2)
    return sum(squares) / len(squares)


def anchor_by_channels(shown_BLD: Tensor, wanted_BLD: Tensor) -> Tensor:
    def standardized(rows: Tensor) -> Tensor:
        centered = rows - rows.sum(-1, keepdim=True) / rows.shape[-1]
        return centered / ((centered**2).sum(-1, keepdim=True) / rows.shape[-1] + 1e-5).sqrt()

    return ((standardized(shown_BLD) - standardized(wanted_BLD)) ** 2).mean()


@pytest.mark.parametrize(
    ("target", "formula"),
    [
        (Gram.model_validate(GRAM), gram_by_pairs),
        (Anchor.model_validate(ANCHOR), anchor_by_channels),
    ],
    ids=["gram", "anchor"],
)
def test_the_loss_is_its_formula_of_the_patches_that_are_shown(
    target: ShownPatches, formula: Callable[[Tensor, Tensor], Tensor]
) -> None:
    visible_BL = torch.stack([noise(PATCHES, seed=image).argsort()[:SHOWN].sort().values for image in range(IMAGES)])
    tokens_BND, shown_BLD = noise(IMAGES, PATCHES, WIDTH, seed=7), noise(IMAGES, SHOWN, WIDTH, seed=8)
    nothing = torch.zeros(IMAGES, 0, dtype=torch.int64)
    where = EncodedInput("x", 0, visible_BL, nothing, torch.arange(IMAGES), torch.arange(IMAGES))
    given = TargetModules(SingleProcess(), (3, 3), 8, decoder=Pointwise(WIDTH), head=None, squared_norms=[])
    values = []
    leaf = shown_BLD.float().requires_grad_()
    cls_B1D = tokens_BND[:, :1].float()
    context = Context(None, {}, {}, {}, {("teachers.start", 1): (cls_B1D, tokens_BND.float())}, {})
    value = target.loss(given, context, Encoded(where, cls_B1D, leaf)).value
    values.append((value, torch.autograd.grad(value, leaf)[0]))
    leaf = shown_BLD.requires_grad_()
    wanted_BLD = torch.stack([tokens_BND[image, visible_BL[image]] for image in range(IMAGES)])
    value = formula(leaf, wanted_BLD)
    values.append((value, torch.autograd.grad(value, leaf)[0]))
    for ours, theirs in zip(*values, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    assert float(values[1][1].abs().max()) > 1e-3


def test_a_gram_matrix_does_not_know_which_way_features_are_turned() -> None:
    tokens_BLD = noise(2, 4, WIDTH, seed=1).float()
    turn_DD = torch.linalg.qr(noise(WIDTH, WIDTH, seed=2)).Q.float()
    target = Gram.model_validate(GRAM)
    torch.testing.assert_close(target.compared(tokens_BLD @ turn_DD), target.compared(tokens_BLD))


def kept(*overrides: str, targets: tuple[dict[str, Any], ...] = (ANCHOR, GRAM), **fields: Any) -> RunConfig:
    """A run of anchors alone, on one whole view."""
    run = tiny_run("continue_siglip", *overrides)
    recipe = run.recipe | {"targets": [*targets], "decoders": {"patches": {"kind": "pointwise"}}, **fields}
    return run.model_copy(update={"recipe": recipe})


def started(run: RunConfig) -> Objective:
    objective = build_objective(run, LABEL_SETS, VOCABULARY)
    start_weights(objective, run)
    return objective


def largest_gradient(loss: Tensor, objective: Objective) -> float:
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return max(float(gradient.abs().max()) for gradient in gradients if gradient is not None)


def test_an_anchor_pulls_nowhere_at_the_start_and_back_from_elsewhere() -> None:
    objective, batch = started(kept()), random_batch(4)
    loss, figures = objective(batch)
    assert figures["anchor/loss"] < 1e-8
    assert figures["gram/loss"] < 1e-8
    assert largest_gradient(loss, objective) < 1e-5
    with torch.no_grad():
        for parameter in objective.student.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss, figures = objective(batch)
    assert min(figures["anchor/loss"], figures["gram/loss"]) > 1e-4
    assert largest_gradient(loss, objective) > 1e-3


def test_the_start_is_what_the_files_hold_whatever_the_student_becomes() -> None:
    """Patches of a stock model on images that are normalized as the student's."""
    run = kept("data.augment.mean=[0.4, 0.5, 0.6]", "data.augment.std=[0.2, 0.3, 0.25]")
    objective, batch = started(run), random_batch(4)
    stock = ViTModel.from_pretrained(tiny_start(), add_pooling_layer=False).eval()
    with torch.no_grad():
        objective.student.model.layernorm.weight.mul_(torch.linspace(0.5, 2, 64))
        pixels = normalize(batch.view(1), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
        wanted_BLD = stock(pixels).last_hidden_state[:, 1:]
        shown_BLD = objective.student.encode_whole(pixels)[1]
        _, figures = objective(batch)
    torch.testing.assert_close(figures["anchor/loss"], anchor_by_channels(shown_BLD, wanted_BLD), rtol=1e-4, atol=1e-7)
    assert figures["anchor/loss"] > 1e-3


@pytest.mark.parametrize("source", ["timm's", "convolutional", "of another image size"])
def test_a_start_may_be_of_any_source_and_backbone(source: str, tmp_path: Path) -> None:
    if source == "timm's":
        save_file(timm_model().state_dict(), tmp_path / "timm.safetensors")
        given = [f"backbone.from_pretrained={tmp_path / 'timm.safetensors'}"]
        given.append("backbone.config={num_attention_heads: 4}")
    elif source == "convolutional":
        fresh = tiny_objective("mae", *MAPS)
        fresh.student.model.save_pretrained(tmp_path / "maps")
        given = [f"backbone.from_pretrained={tmp_path / 'maps'}", "backbone.config={image_size: 64}"]
    else:
        given = ["backbone.config={image_size: 64}"]
    objective = started(kept(*given))
    side = objective.student.image_size
    _, figures = objective(random_batch(2, image=side))
    assert max(float(figures[f"{name}/loss"]) for name in ("anchor", "gram")) < 1e-8


def test_a_start_with_new_weights_is_no_teacher(tmp_path: Path) -> None:
    """InternImage as it is published has no fusion head."""
    config = copy.deepcopy(tiny_objective("mae", *MAPS).student.model.config)
    config.fusion_width = None
    InternImageModel(config).save_pretrained(tmp_path / "maps")
    given = [f"backbone.from_pretrained={tmp_path / 'maps'}", "backbone.config={image_size: 64}"]
    with pytest.raises(ConfigError) as caught:
        started(kept(*given))
    assert caught.value.where is not None
    assert caught.value.where.startswith("backbone.from_pretrained")


def test_hidden_patches_count_where_they_are_mask_tokens_and_not_where_they_are_dropped() -> None:
    losses = {}
    for hidden in ("token", "dropped"):
        inputs = [{"name": "x", "view": 1, "mask": {"form": "block", "ratio": 0.5, "masked": hidden}}]
        objective = started(kept(inputs=inputs))
        (part,) = objective.inputs_of(random_batch(4))
        assert part.visible_BL.shape[1] == (16 if hidden == "token" else 8)
        losses[hidden] = objective(random_batch(4))[1]
    assert all(float(figures["gram/loss"]) > 0 for figures in losses.values())
    assert losses["token"]["anchor/loss"] > losses["dropped"]["anchor/loss"]


def test_a_gram_matrix_needs_no_width_and_an_anchor_needs_the_students() -> None:
    other = {"teachers": {"start": {"from_pretrained": tiny_teacher()}}}
    objective = started(kept(targets=(GRAM,), **other))
    assert objective.teachers["start"].width == 48
    assert math.isfinite(float(objective(random_batch(2))[0].detach()))
    with pytest.raises(ConfigError) as caught:
        build_objective(kept(targets=(ANCHOR,), **other), LABEL_SETS, VOCABULARY)
    assert caught.value.where == "recipe.targets"


def test_a_student_that_starts_anew_has_no_start_to_be_kept_near() -> None:
    run = kept("backbone.from_pretrained=null")
    with pytest.raises(ConfigError) as caught:
        build_objective(run, LABEL_SETS, VOCABULARY)
    assert caught.value.where == "recipe.teachers.start.from_pretrained: student"
    names = inference_names(run, LABEL_SETS, VOCABULARY)  # an export has no use for the teacher
    assert names
    assert not [name for name in names if name.startswith("teachers.")]


def test_the_hash_of_a_start_is_that_of_its_files_wherever_they_lie(tmp_path: Path) -> None:
    def hashes(folder: Path | str) -> dict[str, str]:
        run = tiny_run("continue_images", f"backbone.from_pretrained={folder}")
        return teachers_sha256(parse_recipe(run.recipe), run.backbone)

    shutil.copytree(tiny_start(), tmp_path / "same")
    shutil.copytree(tiny_start(), tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    assert hashes(tiny_start()).keys() == {"start"}
    assert hashes(tmp_path / "same") == hashes(tiny_start()) != hashes(tmp_path / "other")


def test_a_folder_named_student_is_not_taken_for_the_start_when_an_export_is_read(tmp_path: Path) -> None:
    shutil.copytree(tiny_teacher(), tmp_path / "student")
    for given, start in ((str(tmp_path / "student"), False), ("student", True)):
        run = tiny_run("continue_siglip", f"recipe.teachers.start.from_pretrained={given}")
        written = parse_recipe(portable_run(run)["recipe"])
        assert written.teachers["start"].is_start is start
        assert str(tmp_path) not in str(written)
