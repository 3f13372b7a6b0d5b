"""Recipes with heads, teachers and balanced weights by the command line, from training to figures of the export."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import TESTS, Job, environment, free_port
from safetensors import safe_open
from shapes import write_run
from tiny import MAPS, tiny_teacher

from m3i_scale.config import load_run

pytestmark = pytest.mark.slow

RUNS = {
    "simclr": ("simclr",),
    "densecl": ("densecl",),
    "global_distillation": ("global_distillation",),
    "unigrad": ("unigrad",),
    "sim_global": ("sim_global",),
    "siglip": ("siglip",),
    "dense_distillation": ("dense_distillation", "recipe.teachers.teacher.from_pretrained=TEACHER"),
    "learned": ("m3i", "recipe.balance={kind: learned}"),
    "maps": ("m3i", *MAPS, "backbone.attention=across_images", "backbone.activation_checkpointing=full"),
    "followed": ("m3i", "recipe.balance={kind: gradient_norm}"),
}


def call(root: Path, name: str, calls: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    (root / f"{name}.json").write_text(json.dumps([{"arguments": arguments} for arguments in calls.values()]))
    results = root / f"results-{name}"
    results.mkdir()
    script = [str(TESTS / "run" / "attempts.py"), str(root / f"{name}.json"), str(results)]
    job = Job([[sys.executable, *script]], [environment()], root / f"logs-{name}", free_port())
    assert job.wait() == [0], job.text()[-4000:]
    return {key: json.loads((results / f"{number}.json").read_text()) for number, key in enumerate(calls)}


@pytest.fixture(scope="module")
def done(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("other-recipes")
    teacher = shutil.copytree(tiny_teacher(), root / "teacher")
    trained, exported, evaluated = {}, {}, {}
    for name, (recipe, *overrides) in RUNS.items():
        given = [override.replace("TEACHER", str(teacher)) for override in overrides]
        run_file = write_run(root / name, shards, recipe, "optim.steps=4", "log.every_steps=2", *given)
        trained[name] = ["train", str(run_file)]
        exported[name] = ["export", str(root / name / "out"), "--output", str(root / name / "export"), "--json"]
        shapes = [str(shards / split) for split in ("val", "train")]
        measures = ["--measure", "knn"] + (["--measure", "retrieval"] if recipe in ("siglip", "m3i") else [])
        evaluated[name] = ["evaluate", str(root / name / "export"), "--data", shapes[0], "--train-data", shapes[1]]
        evaluated[name] += [*measures, "--json"]
    result = {"train": call(root, "train", trained)}
    shutil.rmtree(teacher)  # nobody needs it any more
    result |= {"export": call(root, "export", exported), "evaluate": call(root, "evaluate", evaluated)}
    return result | {"root": root}


@pytest.mark.parametrize("stage", ["train", "export", "evaluate"])
@pytest.mark.parametrize("name", RUNS)
def test_it_ends_well(done: dict[str, Any], stage: str, name: str) -> None:
    outcome = done[stage][name]
    assert outcome["traceback"] is None, outcome["traceback"]
    assert outcome["code"] == 0, outcome["text"][-2000:]


@pytest.mark.parametrize("name", RUNS)
def test_records_have_every_target_and_finite_metrics(done: dict[str, Any], name: str) -> None:
    lines = [json.loads(line) for line in (done["root"] / name / "out" / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["kind"] == "train"]
    assert [record["step"] for record in records] == [2, 4]
    targets = load_run(str(done["root"] / name / "run.yaml")).recipe["targets"]
    names = {target["name"] for target in targets}
    assert names
    for record in records:
        for prefix in ("loss", "loss_weight", "grad_norm"):
            assert {key.split("/")[1] for key in record if key.startswith(f"{prefix}/")} == names
        for target in names:
            values = [record[f"{prefix}/{target}"] for prefix in ("loss", "loss_weight", "grad_norm")]
            assert all(isinstance(value, float) and math.isfinite(value) for value in values), (target, values)
        assert not [key for key, value in record.items() if value in ("nan", "inf", "-inf")]


def test_what_only_training_needs_is_not_exported(done: dict[str, Any]) -> None:
    for name in RUNS:
        with safe_open(done["root"] / name / "export" / "heads" / "heads.safetensors", "pt") as file:
            keys = list(file.keys())
        assert not [key for key in keys if key.startswith(("momentum.", "teachers.", "states.", "weights."))]
    text = (done["root"] / "dense_distillation" / "export" / "heads" / "objective.json").read_text()
    assert json.loads(text)["run"]["recipe"]["teachers"] == {"teacher": {"from_pretrained": "teacher"}}
    assert str(done["root"]) not in text
