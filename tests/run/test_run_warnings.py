"""Valid settings that are probably mistakes are warnings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import Forks
from shapes import write_run

from m3i_scale.config import known_runs, load_run, run_values, valid_part
from m3i_scale.data.shards import read_sample_count
from m3i_scale.objective.recipe import load_run_and_recipe
from m3i_scale.run.check import errors_of
from m3i_scale.run.run_warnings import config_warnings, warnings_of

DATA = "data.datasets.main.path=/data/shards/train"


def warned(run_file: str, *overrides: str) -> list[str]:
    """The warnings about values, without a look at data and weights."""
    return [*config_warnings(*load_run_and_recipe(run_file, [DATA, *overrides]))]


@pytest.mark.parametrize("name", sorted(known_runs()))
def test_nothing_is_unusual_about_a_built_in_run(name: str) -> None:
    assert warned(name) == []


# name of a run → overrides that are a mistake, and the nearest that are none
SGD = ("optim.eps=1e6", "optim.momentum_correction=false", "optim.weight_decay=0")
MISTAKES: dict[str, tuple[str, list[str], list[str]]] = {
    "optim.lr": ("mae", ["optim.lr=1"], ["optim.lr=0.5"]),
    "optim.lr of a detector": ("coco_vitdet_b", ["optim.lr=0.02"], ["optim.lr=0.005"]),
    "optim.lr of a segmenter": ("ade20k_linear", ["optim.lr=0.01"], ["optim.lr=0.005"]),
    "optim.contrastive_batch": (
        "mae",
        ["optim.contrastive_batch=global"],
        ["optim.contrastive_batch=micro"],
    ),
    "optim.contrastive_batch without accumulation": (
        "clip",
        ["optim.contrastive_batch=global", "optim.micro_batch_size=4096"],
        ["optim.contrastive_batch=global", "optim.micro_batch_size=2048"],
    ),
    "recipe.targets.0.distribution.temperature": (
        "clip",
        ["recipe.targets.0.distribution.temperature=14"],
        ["recipe.targets.0.distribution.temperature=1"],
    ),
    "recipe.targets.0.distribution.temperature of bernoulli": (
        "siglip",
        ["recipe.targets.0.distribution.temperature=10"],
        ["recipe.targets.0.distribution.temperature=0.1"],
    ),
    "recipe.targets.0.distribution.temperature as a schedule": (
        "simclr",
        ["recipe.targets.0.distribution.temperature=[[0, 0.1], [0.5, 14]]"],
        ["recipe.targets.0.distribution.temperature=[[0, 0.1], [0.5, 0.2]]"],
    ),
    "data.augment.color_jitter": (
        "clip",
        ["data.augment.color_jitter=[0.8,0.8,0.8,0.2]", "data.augment.color_jitter_p=0"],
        ["data.augment.color_jitter=[0.8,0.8,0.8,0.2]", "data.augment.color_jitter_p=0.5"],
    ),
    "data.datasets.main.augment.color_jitter": (
        "clip",
        ["data.datasets.main.augment={color_jitter: [0.8, 0.8, 0.8, 0.2], color_jitter_p: 0}"],
        ["data.datasets.main.augment={color_jitter: [0.8, 0.8, 0.8, 0.2], color_jitter_p: 0.5}"],
    ),
    "data.augment.scale_jitter": (
        "simclr",
        ["recipe.views=[{count: 2, crop_scale: [0.2, 1]}]", "data.augment.scale_jitter=[0.5, 2]"],
        ["recipe.views=[{crop_scale: [0.2, 1]}, {}]", "data.augment.scale_jitter=[0.5, 2]"],
    ),
    "data.validation": (
        "mae",
        ["data.validation.val.path=/data/val"],
        ["data.validation.val.path=/data/val", "evaluation.every_steps=5"],
    ),
    "optim.clip_grad_norm": (
        "supervised",
        [*SGD, "optim.trust_coefficient=0.001"],
        [*SGD, "optim.trust_coefficient=0.001", "optim.clip_grad_norm=0"],
    ),
    "target anchor": (
        "continue_clip",
        ["backbone.from_pretrained=/data/clip", "backbone.freeze=[all]", "optim.layer_decay=1"],
        ["backbone.from_pretrained=/data/clip", "optim.layer_decay=1"],
    ),
    "optim.layer_decay": (
        "clip",
        ["backbone.from_pretrained=/data/clip", "backbone.freeze=[all]", "optim.layer_decay=0.75"],
        ["backbone.from_pretrained=/data/clip", "backbone.freeze=[all]"],
    ),
    "data.augment.flip": (
        "simclr",
        ["recipe.views=[{count: 2, flip: 0.5}]", "data.augment.flip=0.1"],
        ["recipe.views=[{flip: 0.5}, {}]", "data.augment.flip=0.1"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_setting_that_nobody_means_is_a_warning_with_its_key(case: str) -> None:
    name, wrong, right = MISTAKES[case]
    (warning,) = warned(name, *wrong)
    assert warning.startswith(case.split(maxsplit=1)[0])
    assert warned(name, *right) == []


def test_an_eps_that_makes_adamw_compute_sgd_has_other_rates() -> None:
    """As the published linear probe: its rate is in units of that eps."""
    sgd = ["optim.momentum_correction=false", "optim.eps=1e7", "optim.lr=4e6"]
    assert warned("mae", *sgd) == []
    assert len(warned("mae", *sgd[1:])) == 1


MISTAKES_AND_ERRORS = ["optim.lr=10", "optim.min_lr=20", "optim.betas=[0.9,1.5]", "data.augment.std=[0,0,0]"]


def test_warnings_are_printed_once_all_values_are_valid(shards: Path, tmp_path: Path, forks: Forks) -> None:
    run_file = str(write_run(tmp_path, shards, "m3i"))
    assert sorted(str(fault.where) for fault in errors_of(run_file, MISTAKES_AND_ERRORS)) == sorted(
        f"override {override}" for override in MISTAKES_AND_ERRORS[1:]
    )
    done = forks.run("check", run_file, *MISTAKES_AND_ERRORS, "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, len(result["errors"]), result["warnings"]) == (2, 3, [])
    (rate,) = warnings_of(run_file, MISTAKES_AND_ERRORS[:1])
    assert rate.startswith("optim.lr is 10")
    done = forks.run("check", run_file, MISTAKES_AND_ERRORS[0])
    assert done.returncode == 0
    assert f"warning: {rate}" in done.stdout
    assert warnings_of("mae", ["optim.lr"]) == warnings_of("no_such_run") == []


def test_sections_with_errors_have_default_values() -> None:
    values = run_values("mae", [DATA, "seed=5", "optim.lr=-1", "optim.eps=1e-7", "nosuch.key=1"])
    run, broken = valid_part(values)
    assert run is not None
    assert broken == {"optim", "nosuch"}
    assert (run.optim.eps, run.seed, set(run.data.datasets)) == (1e-8, 5, {"main"})


def test_rules_of_two_fields_are_told_with_other_errors() -> None:
    wrong = ["optim.betas=[2,2]", "optim.warmup_steps=300", "optim.steps=200", "optim.lr=1e-3", "optim.min_lr=1e-2"]
    milestones = "optim.schedule={kind: multi_step, milestones: [50, 400]}"
    found = " ".join(fault.what for fault in errors_of("mae", [DATA, *wrong, milestones]))
    for key in ("optim.betas", "optim.warmup_steps", "optim.min_lr", "optim.schedule"):
        assert key in found


def test_data_that_are_read_twice_are_a_warning(shards: Path, tmp_path: Path) -> None:
    run_file = str(write_run(tmp_path, shards, "mae"))
    val, train = shards / "val", shards / "train"
    evaluates = ["evaluation.every_steps=4", "evaluation.batches=1"]
    assert warnings_of(run_file, [*evaluates, f"data.validation.val.path={val}"]) == []
    pattern = f"{train.parent}/./train/shapes-{{000000..000002}}.tar"  # the same shards by another name
    (leak,) = warnings_of(run_file, [*evaluates, f'data.validation.val.path="{pattern}"'])
    assert "data.validation.val" in leak
    assert "3 of the 3" in leak
    (twice,) = warnings_of(run_file, [f"data.datasets.again.path={train}"])
    assert "data.datasets.again" in twice
    assert warnings_of(run_file, [f"data.datasets.again.path={val}"]) == []


def test_a_key_that_stands_twice_on_the_command_line_is_a_warning() -> None:
    (twice,) = warnings_of("mae", ["optim.lr=1e-3", "optim.eps=1e-7", "optim.lr=2e-3"])
    assert twice.startswith("optim.lr")
    assert load_run("mae", ["optim.lr=1e-3", "optim.lr=2e-3"]).optim.lr == 2e-3


def test_an_override_without_a_value_is_told(shards: Path, tmp_path: Path) -> None:
    """What a shell makes of `backbone.preset=$PRESET` where there is no such variable."""
    run_file = str(write_run(tmp_path, shards, "mae"))
    for override in ("backbone.preset=", "optim.lr= ", "backbone.preset=''"):
        (fault,) = errors_of(run_file, [override])
        assert "backbone.preset" in str(fault) or "optim.lr" in str(fault)
    assert errors_of(run_file, ["backbone.preset=null"]) == []


@pytest.mark.parametrize(
    "field", ["dtype=bfloat16", "problem_type=regression", "return_dict=false", "output_attentions=true"]
)
@pytest.mark.parametrize("section", ["backbone", "text"])
def test_fields_of_transformers_without_use_here_are_told(
    section: str, field: str, shards: Path, tmp_path: Path
) -> None:
    run_file = str(write_run(tmp_path, shards, "m3i"))
    (fault,) = errors_of(run_file, [f"{section}.config.{field}"])
    assert field.partition("=")[0] in fault.what
    dropout = "attention_probs_dropout_prob=0.1"
    assert errors_of(run_file, [f"{section}.config.{dropout}", f"{section}.config.initializer_range=0.01"]) == []


def test_the_text_tower_has_types_of_tokens(shards: Path, tmp_path: Path) -> None:
    run_file = str(write_run(tmp_path, shards, "m3i"))
    (fault,) = errors_of(run_file, ["text.config.type_vocab_size=0"])
    assert fault.where == "text.config.type_vocab_size"


def test_a_learning_rate_of_another_batch_size_is_a_warning_with_the_scaled_value(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("extends: m3i_mini\noptim: {batch_size: 64}\n")
    for name, overrides in ((str(tmp_path / "run.yaml"), []), ("m3i_mini", ["optim.batch_size=64"])):
        (rate,) = warnings_of(name, [DATA, *overrides])
        assert "optim.lr=0.0005 (square root) or 0.00025 (linear)" in rate
        assert warnings_of(name, [DATA, *overrides, "optim.lr=1e-3"]) == []
    assert warnings_of("m3i_mini", [DATA, "optim.batch_size=256"]) == []


def test_thousands_of_epochs_are_a_warning_with_a_usual_number_of_steps(shards: Path, tmp_path: Path) -> None:
    run_file = str(write_run(tmp_path, shards, "mae"))
    images = read_sample_count(str(shards / "train"), "samples")
    assert images
    most = 2_000 * images // 8
    assert warnings_of(run_file, [f"optim.steps={most}"]) == []
    (epochs,) = warnings_of(run_file, [f"optim.steps={most + images}", "optim.warmup_steps=0"])
    assert f"optim.steps={round(300 * images / 8)}" in epochs
    assert f"{images} images" in epochs
    limited = [f"optim.steps={most + images}", "data.datasets.shapes.epochs=5"]
    assert warnings_of(run_file, limited) == []
    other = f"data.datasets.other={{path: {shards / 'val'}, weight: 99}}"
    (of_other,) = warnings_of(run_file, [f"optim.steps={most}", other])
    assert "data.datasets.other" in of_other
