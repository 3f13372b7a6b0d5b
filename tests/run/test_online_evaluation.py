"""Online evaluation: it does not change the run, and measures what `evaluate` would measure on an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_runs import Done, call, make_calls, make_run
from shapes import metrics, train, write_run
from tiny import MAPS

from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.errors import UserError
from m3i_scale.evaluation.encoding import compute_of
from m3i_scale.evaluation.features import load_vision
from m3i_scale.evaluation.job import Encoders, read_side
from m3i_scale.evaluation.online_metrics import NEIGHBOURS, STRENGTH
from m3i_scale.evaluation.probes import knn_predict, linear_predict, rankme
from m3i_scale.evaluation.samples import open_table
from m3i_scale.exports.export import export
from m3i_scale.report.run_files import read_run
from m3i_scale.run.check import errors_of
from m3i_scale.run.run_warnings import warnings_of

STUDENT = {"knn", "linear", "rankme", "patch_similarity", "high_norm_tokens", "zero_shot"} | {
    "image_to_text_r1",
    "text_to_image_r1",
}
EMA = {"knn", "linear", "rankme", "patch_similarity", "high_norm_tokens"}


def online(shards: Path, **fields: Any) -> str:
    settings = {"every_steps": 2, "data": str(shards / "val"), "train_data": str(shards / "train"), **fields}
    return f"evaluation.online={json.dumps(settings)}"


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {
            name.removeprefix("evaluation/"): value
            for name, value in line.items()
            if name.startswith("evaluation/") and not name.startswith("evaluation/online_")
        }
        for line in lines
        if line["kind"] == "evaluation"
    }


# ------------------------------------------------------------------ on one and two ranks


@pytest.fixture(scope="module")
def runs(shards: Path, foreground: Done, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Two ranks under ZeRO-3 and ZeRO-1, `plain` and `online`."""
    root = tmp_path_factory.mktemp("online")
    settings = {
        "zero3_online": [online(shards)],
        "zero1_plain": ["deepspeed=zero1_cpu_fp32"],
        "zero1_online": [
            "deepspeed=zero1_cpu_fp32",
            online(shards),
            "checkpoint.keep_latest=1",
            "checkpoint.keep_best={metric: evaluation/ema/rankme, mode: max}",
        ],
    }
    folders = {name: make_run(root / name, shards) for name in settings}
    calls = {
        name: call(folders[name], "checkpoint.background=false", *given, faults=[]) for name, given in settings.items()
    }
    done = make_calls(calls, folders, root / "results")
    for name, one in done.items():
        assert one.codes == [0, 0], (name, one.texts)
    return done | {"zero3_plain": foreground}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_losses_and_weights_are_bitwise_identical_with_and_without(runs: dict[str, Done], stage: str) -> None:
    plain, measured = runs[f"{stage}_plain"], runs[f"{stage}_online"]
    assert metrics(plain.folder / "run.yaml") == metrics(measured.folder / "run.yaml")
    for which in ("student", "ema"):
        first, second = (dict(saved_weights(one.root / "step-00000006", which)) for one in (plain, measured))
        assert first.keys() == second.keys()
        assert [name for name, value in first.items() if not torch.equal(second[name], value)] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_metrics_of_student_and_ema_are_written_at_the_first_step_every_so_many_and_the_last(
    runs: dict[str, Done], stage: str
) -> None:
    found = evaluations(runs[f"{stage}_online"].folder)
    assert list(found) == [0, 2, 4, 6]
    names = {f"student/{name}" for name in STUDENT} | {f"ema/{name}" for name in EMA}
    assert all(set(values) == names for values in found.values())
    assert all(np.isfinite(list(values.values())).all() for values in found.values())
    # At the start the EMA is the student; then it lags behind.
    assert found[0]["ema/rankme"] == found[0]["student/rankme"]
    assert found[6]["ema/rankme"] != found[6]["student/rankme"]


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_by_an_online_metric(runs: dict[str, Done]) -> None:
    done = runs["zero1_online"]
    found = evaluations(done.folder)
    best = max((2, 4, 6), key=lambda step: found[step]["ema/rankme"])
    assert set(done.steps()) == {best, 6}


@pytest.mark.slow
def test_one_rank_measures_the_same_as_two_as_an_export_and_after_a_resume(
    runs: dict[str, Done], shards: Path, tmp_path: Path
) -> None:
    same = "optim.micro_batch_size=8"  # as two ranks of four, so that the losses compare the same samples
    run_file = write_run(tmp_path / "one", shards, "m3i", "optim.steps=6", "hardware.peak_tflops=1.0", same)
    job = train(run_file, "deepspeed=zero1_cpu_fp32", online(shards))
    assert job.wait() == [0], job.text
    one, two = evaluations(run_file.parent), evaluations(runs["zero1_online"].folder)
    assert one[0] == pytest.approx(two[0], rel=1e-4, abs=1e-6)
    for name in ("rankme", "patch_similarity"):  # one of 21 images could change its neighbors by rounding
        for encoder in ("student", "ema"):
            assert one[6][f"{encoder}/{name}"] == pytest.approx(two[6][f"{encoder}/{name}"], rel=1e-3)

    for weights, encoder in (("student", "student"), ("ema", "ema")):
        folder = tmp_path / weights
        export(run_file.parent / "out", folder, weights=weights)
        vision = load_vision(folder, "mean", torch.device("cpu"))
        replicas = [Encoders(vision, {})]
        sides = [
            read_side(open_table(str(shards / part), part), replicas, compute_of("cpu"), part)
            for part in ("train", "val")
        ]
        (train_ND, fitted), (test_ND, asked) = ((side.features["model"], side.table.label_array) for side in sides)
        knn = knn_predict(train_ND, fitted, test_ND, neighbours=(NEIGHBOURS,), classes=3)[NEIGHBOURS]
        linear, _ = linear_predict(train_ND, fitted, test_ND, STRENGTH)
        found = one[6]
        assert found[f"{encoder}/rankme"] == pytest.approx(rankme(test_ND), rel=1e-3)
        assert found[f"{encoder}/knn"] == pytest.approx(float((knn == asked).mean()), abs=1e-6)
        assert found[f"{encoder}/linear"] == pytest.approx(float((linear == asked).mean()), abs=1e-6)

    shutil.rmtree(run_file.parent / "out" / "checkpoints" / "step-00000006")
    resumed = train(run_file, "deepspeed=zero1_cpu_fp32", online(shards), logs="resumed")
    assert resumed.wait() == [0], resumed.text
    assert evaluations(run_file.parent) == one  # repeated steps have the same values, and no step occurs twice
    lines = (run_file.parent / "out" / "metrics.jsonl").read_text().splitlines()
    assert sum('"kind": "evaluation"' in line for line in lines) == 4


# ------------------------------------------------------------------ invalid input, before step 1


def faults(tmp_path: Path, shards: Path, recipe: str, *overrides: str) -> list[UserError]:
    return errors_of(str(write_run(tmp_path / "run", shards, recipe)), list(overrides))


def test_valid_settings_have_no_errors(shards: Path, tmp_path: Path) -> None:
    best = "checkpoint.keep_best={metric: evaluation/student/knn, mode: max}"
    assert faults(tmp_path, shards, "m3i", online(shards), best) == []


@pytest.mark.parametrize(
    ("recipe", "fields", "where"),
    [
        ("m3i", {"train_data": None, "metrics": ["knn"]}, "evaluation.online"),
        ("mae", {"metrics": ["zero_shot"]}, "evaluation.online.metrics"),
        ("m3i", {"data": "/data/nowhere"}, "evaluation.online.data"),
        ("m3i", {"train_data": "/data/nowhere"}, "evaluation.online.train_data"),
        ("m3i", {"metrics": ["miou"]}, "evaluation.online.metrics"),
        ("m3i", {"every_steps": 0}, "evaluation.online.every_steps"),
        ("m3i", {"data": "ftp://server/val"}, "evaluation.online.data"),
    ],
)
def test_settings_that_cannot_work_are_errors(
    shards: Path, tmp_path: Path, recipe: str, fields: dict[str, Any], where: str
) -> None:
    (fault,) = faults(tmp_path, shards, recipe, online(shards, **fields))
    assert where in str(fault)
    assert fault.fix


def test_a_class_token_that_the_backbone_lacks_is_an_error(shards: Path, tmp_path: Path) -> None:
    overrides = [*MAPS, online(shards, pool="cls")]
    (fault,) = errors_of(str(write_run(tmp_path, shards, "barlow")), overrides)
    assert "evaluation.online.pool" in str(fault.where)


def test_images_instead_of_shards_and_the_same_shards_twice_are_errors(shards: Path, tmp_path: Path) -> None:
    (fault,) = faults(tmp_path / "a", shards, "m3i", online(shards, data=str(shards.parent / "images")))
    assert "evaluation.online.data" in str(fault.where)
    assert "shards make" in str(fault.fix)
    (fault,) = faults(tmp_path / "b", shards, "m3i", online(shards, data=str(shards / "train")))
    assert "share 16 of 16" in str(fault)


def test_other_classes_are_an_error(shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "val"
    other.mkdir()
    for path in (shards / "val").glob("*.tar"):
        (other / path.name).symlink_to(path)
    for classes in (None, []):  # shards of images without classes have an empty list
        if classes is not None:
            (other / "labels.json").write_text(json.dumps(classes))
        (fault,) = faults(tmp_path, shards, "m3i", online(shards, data=str(other)))
        assert "labels.json" in str(fault.where)
        assert "evaluation.online.train_data" in str(fault.fix)
    (other / "labels.json").write_text(json.dumps(["disc", "ring"]))
    (fault,) = faults(tmp_path, shards, "m3i", online(shards, data=str(other)))
    assert "2 and 3 (1 in common)" in str(fault)


def test_a_metric_that_is_not_measured_is_an_error_with_the_reason(shards: Path, tmp_path: Path) -> None:
    best = "checkpoint.keep_best={metric: evaluation/ema/knn, mode: max}"
    (fault,) = faults(tmp_path / "a", shards, "mae", online(shards), best)
    assert "no EMA teacher" in str(fault)
    (fault,) = faults(tmp_path / "b", shards, "m3i", online(shards, train_data=None), best)
    assert "evaluation.online.train_data" in str(fault)


@pytest.mark.parametrize(
    ("metric", "mode", "where"),
    [
        ("evaluation/ema/zero_shot", "max", "checkpoint.keep_best.metric"),
        ("evaluation/student/knn", "min", "checkpoint.keep_best.mode"),
        ("evaluation/loss", "min", "checkpoint.keep_best.metric"),
        ("loss", "min", "checkpoint.keep_best.metric"),
        ("knn", "max", "checkpoint.keep_best.metric"),
    ],
)
def test_a_metric_that_is_not_measured_cannot_choose_checkpoints(
    shards: Path, tmp_path: Path, metric: str, mode: str, where: str
) -> None:
    best = f"checkpoint.keep_best={{metric: {metric}, mode: {mode}}}"
    (fault,) = faults(tmp_path, shards, "m3i", online(shards), best)
    assert str(fault.where).startswith(where)


def test_training_data_without_probes_are_a_warning(shards: Path, tmp_path: Path) -> None:
    run_file = str(write_run(tmp_path / "run", shards, "m3i"))
    for chosen, count in ((["rankme"], 1), (["rankme", "knn"], 0)):
        lines = warnings_of(run_file, [online(shards, metrics=chosen)])
        assert len([line for line in lines if "train_data has no effect" in line]) == count


def test_training_images_as_test_images_are_a_warning_with_numbers(shards: Path, tmp_path: Path) -> None:
    run_file = write_run(tmp_path / "run", shards, "m3i")
    swapped = online(shards, data=str(shards / "train"), train_data=str(shards / "val"))
    text = "16 of the 16 shards of evaluation.online"
    assert [line for line in warnings_of(str(run_file), [swapped]) if text in line]
    assert not [line for line in warnings_of(str(run_file), [online(shards)]) if "evaluation.online" in line]


# ------------------------------------------------------------------ records


def test_losses_and_online_metrics_of_a_step_are_one_evaluation_in_the_report(tmp_path: Path) -> None:
    def line(step: int, **values: float) -> str:
        time = f"2026-11-01T10:00:{step:02d}.000+00:00"
        named = {f"evaluation/{name}": value for name, value in values.items()}
        return json.dumps({"kind": "evaluation", "step": step, "time": time, **named})

    lines = [line(2, **{"loss": 3.0}), line(2, **{"student/knn": 0.25}), line(4, **{"loss": 2.5})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "run.yaml").write_text("name: run\n")
    run = read_run(tmp_path)
    assert [(one["step"], len(one)) for one in run.evaluations] == [(2, 5), (4, 4)]
    assert run.scores == {"kNN (student)": 0.25}
