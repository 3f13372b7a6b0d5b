"""Policies of activations and a deterministic run by the command line: the same run, or refused before step 1."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import TESTS, Job, environment, free_port
from shapes import metrics, write_run

pytestmark = pytest.mark.slow

POLICIES = {
    "none": "none",
    "selective": "selective",
    "offload": "offload",
}
OVERRIDES = {name: f"backbone.activation_checkpointing={policy}" for name, policy in POLICIES.items()}
OVERRIDES["deterministic"] = "hardware.deterministic=true"


@pytest.fixture(scope="module")
def done(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("activations")
    calls = []
    for name, override in OVERRIDES.items():
        run_file = write_run(root / name, shards, "m3i", "optim.steps=3", override)
        calls.append({"arguments": ["train", str(run_file)]})
    (root / "calls.json").write_text(json.dumps(calls))
    (root / "results").mkdir()
    script = [str(TESTS / "run" / "attempts.py"), str(root / "calls.json"), str(root / "results")]
    job = Job([[sys.executable, *script]], [environment()], root / "logs", free_port())
    assert job.wait() == [0], job.text()[-4000:]
    results = {name: json.loads((root / "results" / f"{n}.json").read_text()) for n, name in enumerate(OVERRIDES)}
    return results | {"root": root}


def test_the_run_is_that_of_no_recomputation(done: dict[str, Any]) -> None:
    figures = {name: metrics(done["root"] / name / "run.yaml") for name in OVERRIDES if done[name]["code"] == 0}
    assert sorted(figures) == ["deterministic", "none", "selective"]
    assert sorted(figures["none"]) == [1, 2, 3]
    assert figures["selective"] == figures["none"]
    assert figures["deterministic"] == figures["none"]  # on a CPU every run is


def test_what_recomputes_is_told(done: dict[str, Any]) -> None:
    assert "activation checkpointing: off" in done["none"]["text"]
    assert "activation checkpointing: selective" in done["selective"]["text"]


def test_what_has_no_effect_is_refused_before_step_1(done: dict[str, Any]) -> None:
    assert done["offload"]["code"] == 2, done["offload"]["text"]
    assert "activation checkpointing 'offload' has no effect" in done["offload"]["text"]
    assert done["offload"]["traceback"] is None
    assert not (done["root"] / "offload" / "out" / "metrics.jsonl").exists()
