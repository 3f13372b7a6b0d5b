"""What a run does once: it sets which layers recompute, and reads a teacher for its hash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import LABEL_SETS, tiny_run

from m3i_scale.engine.deepspeed.resolve import ResolvedConfig
from m3i_scale.errors import CheckpointError
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run import setup
from m3i_scale.run.resume import check_resume, checkpoint_meta
from m3i_scale.run.setup import ResolvedRun, run_yaml

CONFIG = {
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1, "torch_adam": True}},
}


def test_a_teacher_is_hashed_once_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reads: list[Any] = []
    monkeypatch.setattr(
        setup, "teachers_sha256", lambda recipe, backbone: reads.append(recipe) or {"teacher": "0" * 64}
    )
    run = tiny_run("dense_distillation")
    plan = ResolvedRun(run, parse_recipe(run.recipe), LABEL_SETS, None, 32, ResolvedConfig(CONFIG, [], "test"), 1)
    metas = [checkpoint_meta(plan, step=step, world_size=1) for step in (1, 2, 3)]
    (tmp_path / "meta.json").write_text(json.dumps(metas[0]))
    (tmp_path / "run.yaml").write_text(run_yaml(run))
    check_resume(plan, tmp_path, 1)
    assert len(reads) == 1
    assert all(meta["identity"]["teachers_sha256"] == {"teacher": "0" * 64} for meta in metas)
    check_resume(replace(plan), tmp_path, 1)  # another run has its own
    assert len(reads) == 2


def test_a_checkpoint_of_another_teacher_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup, "teachers_sha256", lambda recipe, backbone: {"teacher": "1" * 64})
    run = tiny_run("dense_distillation")
    plan = ResolvedRun(run, parse_recipe(run.recipe), LABEL_SETS, None, 32, ResolvedConfig(CONFIG, [], "test"), 1)
    meta = json.loads(json.dumps(checkpoint_meta(plan, step=1, world_size=1)))
    meta["identity"]["teachers_sha256"] = {"teacher": "0" * 64}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "run.yaml").write_text(run_yaml(run))
    with pytest.raises(CheckpointError) as caught:
        check_resume(plan, tmp_path, 1)
    assert "teachers_sha256.teacher was" in str(caught.value.why)
