"""FLOPs of a step are counted without values, and are those of a step with values."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from image_text_models import write_model
from tiny import LABEL_SETS, VOCABULARY, first_weights, tiny_run

from m3i_scale.backbones.flops import counter
from m3i_scale.config import load_run
from m3i_scale.data.batch import synthetic_batch
from m3i_scale.objective.build import build_objective
from m3i_scale.run.flops import step_flop

RECIPES = {name: (name,) for name in tiny.RECIPES} | {
    "m3i_maps": ("m3i", *tiny.MAPS, "backbone.attention=across_images"),
    "m3i_eager": ("m3i", "backbone.attention_kernel=eager"),
}


def counted(name: str, *overrides: str) -> dict[str, float]:
    run = tiny_run(*RECIPES[name], "optim.batch_size=8", *overrides)
    return step_flop(run, LABEL_SETS, VOCABULARY)


@pytest.mark.parametrize("name", RECIPES)
def test_counting_without_values_gives_what_a_real_step_computes(name):
    run = tiny_run(*RECIPES[name], "optim.batch_size=8")
    objective = build_objective(run, LABEL_SETS, VOCABULARY)
    first_weights(objective, 0)
    image = objective.student.image_size
    batch = synthetic_batch(
        4, objective.recipe.drawn_views, image=image, tokens=run.text.max_tokens, classes=2, vocabulary=VOCABULARY
    )
    with counter() as real:
        objective(replace(batch, seeds_B=torch.arange(4)))[0].backward()
    assert counted(name)["model"] == 2 * real.get_total_flops()  # two micro-batches a step


def test_parts_of_a_step():
    parts = counted("m3i")
    assert parts["model"] == sum(parts[name] for name in ("forward", "teacher", "heads", "backward"))
    assert min(parts[name] for name in ("forward", "teacher", "heads", "backward", "text")) > 0


def test_a_frozen_target_has_no_backward_pass():
    without, parts = counted("supervised"), counted("byol")
    assert without["teacher"] == 0
    trained = parts["forward"] + parts["heads"]
    assert 1.8 * trained < parts["backward"] < 2.01 * trained


def test_recomputed_layers_do_not_count():
    none, full = (
        counted("supervised", f"backbone.activation_checkpointing={policy}")["model"] for policy in ("none", "full")
    )
    assert none == full


@pytest.fixture(autouse=True)
def _nothing_is_left_on_the_meta_device() -> Iterator[None]:
    yield
    assert torch.empty(1).device.type != "meta"


def test_a_frozen_text_encoder_has_no_backward_pass(tmp_path: Path) -> None:
    folder = write_model("clip", tmp_path / "clip")
    starts = [f"{part}.from_pretrained={folder}" for part in ("backbone", "text")]
    parts = {}
    for frozen in (False, True):
        settings = [*starts, "recipe.targets.0.width=40", "text.max_tokens=12", f"text.freeze={str(frozen).lower()}"]
        run = load_run("continue_clip", ["optim.batch_size=4", "optim.micro_batch_size=4", *settings])
        parts[frozen] = step_flop(run, {}, 30)
    assert parts[True]["text"] == pytest.approx(parts[False]["text"] / 3)
