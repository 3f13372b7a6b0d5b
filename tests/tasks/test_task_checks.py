"""What a task cannot be trained with, or has no effect on, is told before anything starts: with its place and a fix."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shapes import make_shapes
from tiny import DINOV2, MAPS, SIGLIP
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.config import load_run
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.run.check import errors_of
from m3i_scale.tasks.classification.classification_task import Classification

THREES, ONES = ([f"data.streams={size}", f"optim.micro_batch_size={size}"] for size in (3, 1))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes")) / "train"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    return folder


def faults(folder: Path, sources: dict[str, Any], task: dict[str, Any], *overrides: str) -> list[UserError]:
    run = {
        "output_dir": str(folder / "out"),
        "task": {"kind": "classification", **task},
        "data": {"datasets": sources, "streams": 4},
        "optim": {"batch_size": 12, "micro_batch_size": 4, "steps": 8, "warmup_steps": 2},
        "deepspeed": "zero3_cpu",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return errors_of(str(folder / "run.yaml"), list(overrides), 1)


@pytest.mark.parametrize(
    "task", [{}, {"layer_decay": 0.65}, {"mixup": 0.8}, {"dcn_lr": 1.0}, {"pool": "mean_pool", "ema": 0.9}]
)
def test_a_task_that_holds_has_no_faults(task: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    assert faults(tmp_path, {"shapes": {"path": str(shards)}}, task, *DINOV2) == []


@pytest.mark.parametrize(
    ("task", "overrides", "where"),
    [
        ({"mixup": 0.8}, [*DINOV2, *THREES], "optim.micro_batch_size"),
        ({"cutmix": 1.0}, [*DINOV2, *ONES], "optim.micro_batch_size"),
        ({"dcn_lr": 0.1}, DINOV2, "task.dcn_lr"),
        ({}, MAPS, "task.pool"),
        ({}, SIGLIP, "task.pool"),
        ({"freeze": True}, DINOV2, "task.freeze"),
        ({"freeze": True}, ["SOURCE", "backbone.activation_checkpointing=full"], "backbone.activation_checkpointing"),
    ],
)
def test_a_setting_that_does_not_go_with_it_is_named(
    task: dict[str, Any], overrides: list[str], where: str, shards: Path, source: Path, tmp_path: Path
) -> None:
    given = [f"backbone.from_pretrained={source}" if override == "SOURCE" else override for override in overrides]
    (fault,) = faults(tmp_path, {"shapes": {"path": str(shards)}}, task, *given)
    assert isinstance(fault, ConfigError)
    assert where in fault.where
    assert fault.fix


def test_an_odd_micro_batch_is_as_good_where_nothing_is_mixed(shards: Path, tmp_path: Path) -> None:
    assert not faults(tmp_path, {"shapes": {"path": str(shards)}}, {}, *DINOV2, *THREES)


def test_classes_are_those_of_one_list(shards: Path, tmp_path: Path) -> None:
    twice = {name: {"path": str(shards)} for name in ("one", "other")}
    (fault,) = faults(tmp_path, twice, {}, *DINOV2)
    assert isinstance(fault, ConfigError)
    assert fault.where == "data.datasets"
    assert all(name in fault.what for name in twice)
    one_name = [f"data.datasets.{name}.label_set=shapes" for name in twice]
    assert not faults(tmp_path, twice, {}, *DINOV2, *one_name)
    assert not faults(tmp_path, twice, {}, *DINOV2, "data.datasets.other.labels=false")


def test_data_without_labels_are_refused(shards: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(shards, tmp_path / "bare")
    (bare / "labels.json").unlink()
    for source in ({"path": str(bare)}, {"path": str(shards), "labels": False}):
        (fault,) = faults(tmp_path, {"shapes": source}, {}, *DINOV2)
        assert isinstance(fault, ConfigError)
        assert fault.where == "data.datasets"
        assert "labels" in fault.fix


def test_a_recipe_beside_a_task_is_refused_but_for_the_one_that_it_gives(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    described = {"task": {"kind": "classification"}, "recipe": Classification().recipe()}
    path.write_text(json.dumps(described))
    assert load_run(str(path)).recipe == described["recipe"]
    path.write_text(json.dumps({"extends": "mae", "task": {"kind": "classification"}}))
    with pytest.raises(ConfigError) as fault:
        load_run(str(path))
    assert str(path) in fault.value.where
    assert fault.value.fix


def test_a_plan_counts_what_learns_what_is_frozen_and_what_is_averaged(
    shards: Path, source: Path, tmp_path: Path
) -> None:
    start = f"backbone.from_pretrained={source}"
    plans: dict[str, Any] = {}
    for name, task in {"all": {}, "frozen": {"freeze": True}, "averaged": {"ema": 0.9}}.items():
        assert not faults(tmp_path, {"shapes": {"path": str(shards)}}, task, start)
        planned = ["plan", str(tmp_path / "run.yaml"), start, "--ranks-per-node", "1", "--json"]
        done = CliRunner().invoke(app, planned)
        assert done.exit_code == 0, done.output
        plans[name] = json.loads(done.stdout)
    numbers = {name: plan["parameters"] for name, plan in plans.items()}
    assert numbers["frozen"]["trained"] + numbers["frozen"]["frozen"] == numbers["all"]["trained"]
    assert 0 < numbers["frozen"]["trained"] < numbers["frozen"]["frozen"]
    assert numbers["averaged"]["ema"] == numbers["averaged"]["trained"] == numbers["all"]["trained"]
    assert plans["frozen"]["flop_per_sample"] < plans["all"]["flop_per_sample"] / 2
    sizes = [plans[name]["checkpoint_gib"] for name in ("frozen", "all", "averaged")]
    assert sizes == sorted(sizes)


def test_a_task_is_imported_when_a_config_names_it_and_without_torch() -> None:
    code = """
import sys
from m3i_scale.config import load_run
from m3i_scale.tasks.base import Task
assert (Task.kinds, Task.choices()) == ({}, ["classification", "segmentation", "detection"])
assert [load_run("detect").task.kind] == list(Task.kinds) == ["detection"]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
