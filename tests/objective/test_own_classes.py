"""Classes of the user's own, in a package that this one knows nothing of: found by `kind`, and imported by consent."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import LABEL_SETS, first_weights, random_batch, tiny_overrides

from m3i_scale.config import RunConfig, load_run, parse_section
from m3i_scale.errors import ConfigError
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.recipe import load_run_and_recipe, parse_recipe
from m3i_scale.objective.regularizers.pooled import PooledRegularizer

OWN = '''
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from m3i_scale.objective.distributions import Density, Loss
from m3i_scale.objective.masks import Mask
from m3i_scale.objective.ranks import global_mean
from m3i_scale.objective.regularizers import Memory
from m3i_scale.objective.regularizers.pooled import PooledRegularizer
from m3i_scale.objective.regularizers import DenseRegularizer
from m3i_scale.objective.targets.base import ImageTarget
from m3i_scale.objective.targets.dense import Dense


def __getattr__(name):
    raise RuntimeError(f"{name} is made by code of this module")


class Mean(Memory):
    """The mean target of earlier batches."""

    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("mean_E", torch.zeros(width))

    @torch.no_grad()
    def update(self, values_BE, ranks):
        self.mean_E.copy_(ranks.sum(values_BE.float().mean(dim=0)) / ranks.world_size)


class Away(PooledRegularizer):
    """Predictions away from the mean target of earlier batches."""

    strength: float = 1.0
    encoders: ClassVar = ("ema",)

    def memory(self, width):
        return Mean(width)

    def loss(self, p, prediction_BE, target_BE, memory, ranks):
        away_B = (prediction_BE.float() @ memory.mean_E.clone()).square()
        value = p.vectors(prediction_BE, target_BE, ranks)
        return Loss(value + self.strength * global_mean(away_B, torch.ones_like(away_B), ranks), remember=target_BE)


class Powers(DenseRegularizer):
    encoders: ClassVar = ("ema",)
    powers: list[int] = [2]

    def statistics(self, target_BND, ranks):
        return sum(ranks.sum(target_BND.float().pow(power).mean()) / ranks.world_size for power in self.powers)

    def loss(self, p, prediction_BQD, target_BQD, statistics, ranks):
        return p.maps(prediction_BQD, target_BQD, ranks) + statistics


class Huber(Density):
    delta: float = 1.0

    def maps(self, prediction, target, ranks):
        error_B = F.huber_loss(prediction.float(), target.float(), reduction="none", delta=self.delta).mean(dim=(1, 2))
        return global_mean(error_B, torch.ones_like(error_B), ranks)


class LowerHalf(Mask):
    def order(self, seeds_B, grid, stream):
        return torch.arange(grid[0] * grid[1], device=seeds_B.device).expand(len(seeds_B), -1)


class Twice(Dense):
    representation: ClassVar = "dense feature, twice"
    factor: float = 2.0

    def loss(self, given, context, encoded):
        loss = super().loss(given, context, encoded)
        return Loss(self.factor * loss.value, loss.nats)


class Undeclared(ImageTarget):
    """Does not say which distributions and regularizers it takes."""

    def loss(self, given, context, encoded):
        return Loss(encoded.tokens_BLD.sum())


class Lossless(ImageTarget):
    pass


class Unregular(PooledRegularizer):
    pass


class Shapeless(Density):
    pass


class Orderless(Mask):
    pass
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package outside of this one, on the path and not imported; its name."""
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "method.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def run_file(folder: Path, package: str) -> Path:
    values = {
        "name": "mine",
        "recipe": {
            "name": "mine",
            "family": "mine",
            "inputs": [
                {"name": "x", "view": 2, "mask": {"form": {"kind": f"{package}.method.LowerHalf"}, "ratio": 0.5}},
            ],
            "momentum": {"projector_depth": 0},
            "decoders": {"pool": {"kind": "mean_pool"}, "dense": {"kind": "transformer", "width": 32, "depth": 1}},
            "heads": {"global": {"width": 24, "hidden": 32}},
            "targets": [
                {"name": "away", "kind": "pooled", "inputs": ["x"], "view": 1, "encoder": "ema", "decoder": "pool"}
                | {"head": "global", "regularizer": {"kind": f"{package}.method.Away", "strength": 0.5}},
                {"name": "twice", "kind": f"{package}.method.Twice", "inputs": ["x"], "view": 1, "tokens": "all"}
                | {"encoder": "ema", "decoder": "dense", "regularizer": "unigrad"}
                | {"distribution": {"kind": f"{package}.method.Huber", "delta": 0.7}},
            ],
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_method_of_ones_own_trains_from_its_run_file(tmp_path: Path, package: str) -> None:
    backbone = [override for override in tiny_overrides("sim") if override.startswith("backbone")]
    run, _ = load_run_and_recipe(str(run_file(tmp_path, package)), backbone)
    objective = build_objective(run, LABEL_SETS, None)
    first_weights(objective, 0)
    batch = random_batch(6)
    loss, figures = objective(batch)
    loss.backward()
    away, twice = objective.recipe.targets
    assert (away.regularizer.kind, twice.distribution.delta) == (f"{package}.method.Away", 0.7)
    assert {"away/loss", "twice/loss"} <= set(figures)
    assert all(p.grad is not None for p in objective.image_heads.parameters())
    assert objective.states["global"].mean_E.any()
    assert "states.global.mean_E" in objective.state_dict()
    _, later = objective(batch)  # now there is a mean to be away from
    assert float(later["away/loss"]) != float(figures["away/loss"])
    single = build_objective(load_run(str(tmp_path / "run.yaml"), [*backbone, "recipe.targets.1.factor=1"]), {}, None)
    single.load_state_dict(objective.state_dict())
    torch.testing.assert_close(2 * single(batch)[1]["twice/loss"], later["twice/loss"])


def test_what_others_wrote_is_read_without_running_its_code(tmp_path: Path, package: str) -> None:
    """The run file in a checkpoint, the description in an export: no module is imported unless the user does it."""
    stored = yaml.safe_load(run_file(tmp_path, package).read_text())
    run = parse_section(RunConfig, stored, where="run.yaml", stored=True)
    with pytest.raises(ConfigError) as caught:
        parse_recipe(run.recipe)
    assert f"--import {package}.method" in str(caught.value)
    assert f"{package}.method" not in sys.modules
    importlib.import_module(f"{package}.method")
    assert parse_recipe(run.recipe).targets[0].regularizer.strength == 0.5
    run.recipe["targets"][0]["regularizer"] = {"kind": f"{package}.method.Computed"}
    with pytest.raises(ConfigError) as caught:  # which the module's own code would make
        parse_recipe(run.recipe)
    assert caught.value.where == "recipe"
    assert "PooledRegularizer" in caught.value.what


def test_what_needs_no_recipe_runs_no_code(tmp_path: Path, package: str) -> None:
    assert load_run(str(run_file(tmp_path, package))).name == "mine"
    assert f"{package}.method" not in sys.modules


SHORT = {
    "regularizer": ("recipe.targets.0.regularizer", "Away"),
    "distribution": ("recipe.targets.1.distribution", "Huber"),
    "form": ("recipe.inputs.0.mask.form", "LowerHalf"),
}


@pytest.mark.parametrize("section", SHORT)
def test_an_import_path_alone_stands_for_a_section_with_its_defaults(
    tmp_path: Path, package: str, section: str
) -> None:
    key, name = SHORT[section]
    given = [f"{where}={name}" for where, name in BUILT_IN.items() if where != key]
    path = str(run_file(tmp_path, package))
    _, short = load_run_and_recipe(path, [*given, f"{key}={package}.method.{name}"])
    _, whole = load_run_and_recipe(path, [*given, f"{key}={{kind: {package}.method.{name}}}"])
    assert short == whole


BUILT_IN = {
    "recipe.targets.0.regularizer": "unigrad",
    "recipe.targets.1.distribution": "gaussian",
    "recipe.inputs.0.mask.form": "random",
    "recipe.targets.1.kind": "dense",
}


def test_a_class_takes_no_name_beside_its_import_path() -> None:
    before = dict(PooledRegularizer.kinds)
    for name in ("unigrad", "a_name_of_its_own"):
        with pytest.raises(TypeError, match=name if name in before else "import path"):
            type("Mine", (PooledRegularizer,), {"kind": name, "__module__": __name__, "__annotations__": {}})
    assert dict(PooledRegularizer.kinds) == before


def test_regularizers_of_equal_class_have_their_own_statistics(tmp_path: Path, package: str) -> None:
    backbone = [override for override in tiny_overrides("sim") if override.startswith("backbone")]
    path = run_file(tmp_path, package)
    values = yaml.safe_load(path.read_text())
    dense = values["recipe"]["targets"][1] | {"kind": "dense", "distribution": "gaussian"}
    values["recipe"]["targets"] = [
        dense | {"name": f"to_{power}", "regularizer": {"kind": f"{package}.method.Powers", "powers": [power]}}
        for power in (2, 4)
    ]
    del values["recipe"]["heads"], values["recipe"]["decoders"]["pool"]
    path.write_text(yaml.safe_dump(values))
    objective = build_objective(load_run_and_recipe(str(path), backbone)[0], LABEL_SETS, None)
    first_weights(objective, 0)
    objective.heads["to_4"].load_state_dict(objective.heads["to_2"].state_dict())
    _, figures = objective(random_batch(6))
    assert figures["to_2/loss"] != figures["to_4/loss"]


def test_targets_that_share_a_head_need_regularizers_that_remember_alike(tmp_path: Path, package: str) -> None:
    values = load_run_and_recipe(str(run_file(tmp_path, package)))[0].recipe
    away = values["targets"][0]
    values["targets"].append(away | {"name": "further"})
    assert len(parse_recipe(values).targets) == 3
    values["targets"][-1] = away | {"name": "further", "regularizer": away["regularizer"] | {"strength": 2.0}}
    with pytest.raises(ConfigError) as caught:
        parse_recipe(values)
    assert caught.value.where == "recipe"
    assert "'global'" in caught.value.what


def test_a_target_that_declares_no_families_is_refused_at_its_keys(tmp_path: Path, package: str) -> None:
    path = str(run_file(tmp_path, package))
    with pytest.raises(ConfigError) as caught:
        load_run_and_recipe(path, [f"recipe.targets.1.kind={package}.method.Undeclared"])
    assert "recipe.targets.1.distribution" in str(caught.value)
    assert "recipe.targets.1.regularizer" in str(caught.value)


INCOMPLETE = {
    "recipe.targets.1.kind": ("Lossless", "loss"),
    "recipe.targets.0.regularizer": ("Unregular", "loss"),
    "recipe.targets.1.distribution": ("Shapeless", "maps or vectors"),
    "recipe.inputs.0.mask.form": ("Orderless", "order"),
}


@pytest.mark.parametrize("key", INCOMPLETE)
def test_a_class_without_its_method_is_found_before_the_first_step(tmp_path: Path, package: str, key: str) -> None:
    name, method = INCOMPLETE[key]
    with pytest.raises(ConfigError) as caught:
        load_run_and_recipe(str(run_file(tmp_path, package)), [f"{key}={package}.method.{name}"])
    assert key.removesuffix(".kind") in str(caught.value)
    assert f"{name}' does not define {method}" in str(caught.value)


FAULTS: dict[str, dict[str, Any]] = {
    "no such class": {"kind": "{}.method.Nothing"},
    "another family": {"kind": "{}.method.Huber"},
    "no class": {"kind": "{}.method.F"},
    "unknown key": {"kind": "{}.method.Away", "strenght": 1},
    "wrong value": {"kind": "{}.method.Away", "strength": "much"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_at_their_key(tmp_path: Path, package: str, fault: str) -> None:
    recipe = load_run_and_recipe(str(run_file(tmp_path, package)))[0].recipe
    recipe["targets"][0]["regularizer"] = {
        key: value.format(package) if key == "kind" else value for key, value in FAULTS[fault].items()
    }
    with pytest.raises(ConfigError) as caught:
        parse_recipe(recipe)
    assert caught.value.where == "recipe"
    assert "recipe.targets.0.regularizer" in caught.value.what


def test_a_module_that_is_not_there_is_told_with_the_run_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_and_recipe(str(run_file(tmp_path, "nowhere_to_be_found")))
    assert str(caught.value.where).endswith("/run.yaml")
    assert "recipe.inputs.0.mask.form" in str(caught.value)
    assert "run.yaml" in str(caught.value.where)


def test_the_command_line_reads_it(tmp_path: Path, package: str) -> None:
    path = run_file(tmp_path, package)
    command = [sys.executable, "-m", "m3i_scale", "recipes", "show", str(path), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path_of(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    targets = json.loads(done.stdout)["targets"]
    assert [target["regularizer"] for target in targets] == [f"{package}.method.Away", "unigrad"]


def path_of(folder: Path) -> str:
    return f"{folder}:{Path(__file__).resolve().parents[2]}"
