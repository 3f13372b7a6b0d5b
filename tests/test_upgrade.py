"""Config files, checkpoints and metrics files of the previous format are read under current names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from m3i_scale.config import RunConfig, load_run, parse_section
from m3i_scale.errors import ConfigError
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.report.metrics_file import MetricsFile
from m3i_scale.upgrade import upgrade_config, upgrade_line, upgrade_meta, upgrade_recipe

OLD = """
extends: siglip2
recipe:
  momentum: {start: 0.9, end: 0.99}
  inputs:
    - {name: x, view: 1}
    - {name: local, view: 3, views: 8}
    - {name: masked, view: 2, mask: {form: random, ratio: 0.5, hidden: token}}
backbone: {attention: own}
data:
  sources: {photos: {shards: /data/photos, weight: 2.0}}
  validation: {photos: {shards: /data/val}}
  workers: 3
  max_bad_fraction: 0.1
  read_attempts: 2
  stall_timeout_s: 100.0
  changed_sources: [photos]
phases: [{steps: 4}, {steps: 6, micro_batch_size: 16}]
optim: {steps: 10, warmup_steps: 1}
timeouts: {join_s: 200.0, start_s: 300.0, step_s: 400.0}
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(OLD)
    return path


def test_an_old_config_file_means_what_it_meant(old: Path) -> None:
    run = load_run(str(old))
    assert run.data.datasets["photos"].path == "/data/photos"
    assert run.data.validation["photos"].path == "/data/val"
    data = run.data
    assert (data.num_workers, data.max_corrupt_fraction, data.max_read_attempts, data.timeout_s) == (3, 0.1, 2, 100.0)
    assert data.changed_datasets == ["photos"]
    assert [stage.steps for stage in run.stages] == [4, 6]
    timeouts = run.timeouts
    assert (timeouts.rendezvous_s, timeouts.startup_s, timeouts.collective_s) == (200.0, 300.0, 400.0)
    assert run.backbone.attention == "within_image"
    recipe = parse_recipe(run.recipe)
    assert recipe.ema is not None
    assert recipe.ema.start == 0.9
    assert recipe.inputs[2].mask is not None
    assert recipe.inputs[2].mask.masked == "mask_token"


def test_a_config_in_a_checkpoint_or_an_export_is_read(old: Path) -> None:
    values = yaml.safe_load(OLD)
    del values["extends"], values["recipe"]
    assert parse_section(RunConfig, values, where="run.yaml", stored=True).data.num_workers == 3
    assert upgrade_config(upgrade_config(values)) == upgrade_config(values)


def test_the_values_that_are_upgraded_stay_as_they_are() -> None:
    recipe = {"teachers": {"teacher": {"from_pretrained": "/data/teacher"}}}
    upgrade_recipe(recipe)["teachers"]["teacher"]["from_pretrained"] = ""
    assert recipe == {"teachers": {"teacher": {"from_pretrained": "/data/teacher"}}}


def test_the_identity_and_the_stages_of_a_checkpoint_are_renamed() -> None:
    old = {"step": 3, "phases": [{"steps": 4}], "identity": {"attention": "own", "recipe": {"momentum": {"end": 1}}}}
    new = {"step": 3, "stages": [{"steps": 4}]}
    new |= {"identity": {"attention": "within_image", "recipe": {"ema": {"end": 1}}}}
    assert upgrade_meta(old) == upgrade_meta(new) == new
    assert "phases" in old


def test_an_encoder_of_a_target_is_renamed() -> None:
    targets = [{"name": "a", "encoder": "momentum"}, {"name": "b", "encoder": "teacher"}, {"name": "c"}]
    assert [item.get("encoder") for item in upgrade_config({"recipe": {"targets": targets}})["recipe"]["targets"]] == [
        "ema",
        "teacher",
        None,
    ]


@pytest.mark.parametrize("values", [None, 3, "text", [1], {"sources": 3}, {"sources": [1]}, {"datasets": {"a": None}}])
def test_values_of_any_shape_stay_for_validation(values: object) -> None:
    upgrade_config({"data": values, "recipe": values, "timeouts": values})


def test_both_names_at_once_are_an_error(old: Path) -> None:
    old.write_text("extends: sim\ndata: {workers: 1, num_workers: 2}\n")
    with pytest.raises(ConfigError):
        load_run(str(old))


@pytest.mark.parametrize("override", ["data.workers=2", "timeouts.join_s=9", "data.sources.a.shards=/data/a"])
def test_an_override_must_have_the_current_name(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run("sim", [override])
    assert caught.value.fix is not None
    assert any(name in caught.value.fix for name in ("data.num_workers", "timeouts.rendezvous_s", "data.datasets"))


LINE = {
    "kind": "train",
    "step": 10,
    "time": "2030-01-01T00:00:00+00:00",
    "loss": 2.0,
    "momentum": 0.99,
    "group/text/loss": 1.5,
    "group/a/b/nats": 2.0,
    "group/text/weight": 1.0,
    "group/text/grad_norm": 0.5,
    "group/text/count": 8.0,
    "group/class/top_1": 0.5,
    "group/boxes/giou": 0.25,
    "source/photos/share": 0.5,
    "phases/fetch": 0.25,
    "phases/step": 0.75,
    "speed/step_s": 2.0,
    "speed/data_wait_s": 0.5,
    "speed/samples_per_s": 4.0,
    "speed/flop_per_s": 1e9,
    "speed/mfu": 0.5,
    "memory_gib": 1.0,
}
CURRENT = {
    "loss": 2.0,
    "ema_decay": 0.99,
    "loss/text": 1.5,
    "mi/a/b": 2.0,
    "loss_weight/text": 1.0,
    "grad_norm/text": 0.5,
    "loss_samples/text": 8.0,
    "top_1/class": 0.5,
    "loss/boxes/giou": 0.25,
    "dataset/photos/share": 0.5,
    "time/data": 0.5,
    "time/optimizer": 1.5,
    "time/step": 2.0,
    "time/data_wait": 0.5,
    "throughput/samples_per_s": 4.0,
    "perf/flops_per_s": 1e9,
    "perf/mfu": 0.5,
    "memory_gib": 1.0,
}


def test_sections_of_a_step_need_its_time() -> None:
    assert upgrade_line({"kind": "train", "phases/fetch": 0.5}) == {"kind": "train"}
    assert upgrade_line({"speed/step_s": 2.0, "phases/fetch": None}) == {"time/step": 2.0}


def test_metrics_are_read_under_their_current_names(tmp_path: Path) -> None:
    facts = {name: LINE[name] for name in ("kind", "step", "time")}
    assert upgrade_line(LINE) == facts | CURRENT
    assert upgrade_line(facts | CURRENT) == facts | CURRENT
    path = tmp_path / "metrics.jsonl"
    lines = [LINE | {"step": step} for step in (10, 20, 30)]
    stage = {"kind": "phase", "step": 4, "time": LINE["time"], "image_size": 32, "micro_batch_size": 4}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in [stage, *lines]))
    file = MetricsFile(path)
    file.read_new_lines()
    with path.open("a") as appended:  # read by columns, as the names are known now
        appended.write("".join(f"{json.dumps(LINE | {'step': step})}\n" for step in (40, 50)))
    file.read_new_lines()
    assert {name: list(np.unique(values)) for name, values in file.steps().figures.items()} == {
        name: [value] for name, value in CURRENT.items()
    }
    with path.open("a") as appended:  # a run that was resumed after the upgrade
        appended.write("".join(f"{json.dumps(facts | CURRENT | {'step': step})}\n" for step in (60, 70)))
    file = MetricsFile(path)
    file.read_new_lines()
    assert {name: list(np.unique(values)) for name, values in file.steps().figures.items()} == {
        name: [value] for name, value in CURRENT.items()
    }
    assert [line["image_size"] for line in file.records["stage"]] == [32]
    assert file.unreadable == 0
