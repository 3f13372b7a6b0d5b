"""Rules of `doctor RUN_DIR`, each with and without its problem."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from run_folder import write_run
from typer.testing import CliRunner

from m3i_scale.backbones.build import backbone_config
from m3i_scale.cli import app
from m3i_scale.config import known_protocols, known_runs, load_run
from m3i_scale.elastic.doctor import command
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.host.findings import NOT_JUDGED, Finding, finding
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.report import diagnosis
from m3i_scale.report.diagnosis import EVALUATIONS, RULES, diagnose

STEPS = 1000
ROWS = STEPS // 10
KEYS = {"check", "host", "ok", "value", "why", "fix", "warning"}
TIME = "2030-01-01T12:00:00.000+00:00"


def constant(value: float) -> list[float]:
    return [value] * ROWS


def ramp(first: float, last: float, rows: int = ROWS) -> list[float]:
    return np.linspace(first, last, rows).tolist()


def make_run(
    folder: Path,
    recipe: str = "mae",
    overrides: Sequence[str] = (),
    *,
    logged: dict[str, list[float]] | None = None,
    evaluated: dict[str, list[float]] | None = None,
    lines: Iterable[dict[str, Any]] = (),
) -> Path:
    """Write a run with a record every 10 steps, and an evaluation every 100."""
    settings = [f"output_dir={folder}", "data.datasets.photos.path=/data/shards/train", f"optim.steps={STEPS}"]
    run = load_run(recipe, [*settings, "optim.warmup_steps=100", *overrides])
    (folder / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    start = {"kind": "run", "step": 0, "time": TIME, "name": run.name, "total_steps": STEPS, "world_size": 1}
    records = [start, *lines]
    columns = {"loss": ramp(2, 1)} | (logged or {})
    for row in range(min(len(values) for values in columns.values())):
        figures = {name: values[row] for name, values in columns.items()}
        records.append({"kind": "train", "step": 10 * (row + 1), "time": TIME} | figures)
    for number, values in enumerate(zip(*(evaluated or {}).values(), strict=True), start=1):
        figures = dict(zip(evaluated or {}, values, strict=True))
        records.append({"kind": "evaluation", "step": 100 * number, "time": TIME} | figures)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def judged(folder: Path, check: str) -> list[Finding]:
    return [item for item in diagnose(folder) if item.check == check]


def problem(folder: Path, check: str) -> Finding:
    """The only problem of a rule. Settings of its fix are valid for the run, and change it."""
    (item,) = judged(folder, check)
    assert item.ok
    assert item.warning
    assert item.why
    assert re.search(r"\d", item.value)
    settings = settings_in(str(item.fix))
    assert settings
    before, after = load_run(str(folder / "run.yaml")), load_run(str(folder / "run.yaml"), settings)
    assert after != before
    parse_recipe(after.recipe)
    backbone_config(after.backbone)
    return item


def settings_in(fix: str) -> list[str]:
    """The settings in front of a fix: `a.b=1 c.d={e: f}, or …` → both."""
    return re.findall(r"(?:^| )([a-z_]+(?:\.\w+)+=(?:\{[^}]*\}|\[\[.*?\]\]|[^ ,]+))", fix.partition(", or ")[0])


def is_fine(folder: Path, check: str) -> bool:
    (item,) = judged(folder, check)
    return item.ok and not item.warning and not item.value.startswith(NOT_JUDGED)


def warned(step: int, group: str, what: str, fix: str) -> dict[str, Any]:
    return {"kind": "warning", "step": step, "time": TIME, "group": group, "what": what, "why": "0.0", "fix": fix}


# ------------------------------------------------------------------ warnings


def test_collapse_that_holds(tmp_path: Path) -> None:
    spread = [0.5] * 50 + [1e-5] * 50
    make_run(tmp_path, logged={"loss/pixels": constant(1), "health/pixels_spread": spread})
    (found,) = judged(tmp_path, "warnings")
    assert "pixels" in found.value
    assert "holds since step 980" in found.value
    assert str(found.fix).startswith("a regularizer")  # a lower optim.lr is the last part of this advice


def test_collapse_that_recovered(tmp_path: Path) -> None:
    logged = {"loss/pixels": constant(1), "health/pixels_spread": [1e-5] * 40 + [0.5] * 60}
    make_run(tmp_path, logged=logged, lines=[warned(30, "pixels", "its target has collapsed", "a lower optim.lr")])
    found = problem(tmp_path, "warnings")
    assert "written at step 30, recovered at step 410" in found.value
    assert settings_in(str(found.fix)) == ["optim.lr=0.0008"]


@pytest.mark.parametrize("group", ["guard", "evaluation"])
def test_warnings_that_records_do_not_show(tmp_path: Path, group: str) -> None:
    written = warned(30, group, "knn falls while the loss falls", "a lower optim.lr")
    (found,) = judged(make_run(tmp_path, lines=[written]), "warnings")
    assert found.warning
    assert found.value == f"{group}: knn falls while the loss falls; written at step 30"
    assert found.fix == "a lower optim.lr"


@pytest.mark.parametrize("std", [0.0, float("nan")])
def test_constant_features(tmp_path: Path, std: float) -> None:
    make_run(tmp_path, logged={"health/pooled_std": constant(std)})
    text = (tmp_path / "metrics.jsonl").read_text().replace("NaN", '"nan"')
    (tmp_path / "metrics.jsonl").write_text(text)
    assert "backbone" in problem(tmp_path, "warnings").value


def test_collapsed_prototypes_get_a_higher_temperature(tmp_path: Path) -> None:
    logged = {"loss/assignment": constant(1), "health/assignment_evenness": constant(0.001)}
    run = load_run("masked_global")
    name = run.recipe["targets"][0]["name"]
    logged = {metric.replace("assignment", name): values for metric, values in logged.items()}
    found = problem(make_run(tmp_path, "masked_global", logged=logged), "warnings")
    assert "recipe.targets.0.regularizer.target_temperature=" in str(found.fix)


def test_two_records_are_no_collapse(tmp_path: Path) -> None:
    logged = {"loss/pixels": constant(1), "health/pixels_spread": [0.5] * 98 + [1e-5] * 2}
    assert is_fine(make_run(tmp_path, logged=logged), "warnings")


# ------------------------------------------------------------------ features


def test_a_rank_that_falls(tmp_path: Path) -> None:
    ranks = {"evaluation/ema/rankme": [50, 80, 90, 100, 90, 80, 50, 40, 40, 40]}
    found = problem(make_run(tmp_path, evaluated=ranks), "rank")
    assert "evaluation/ema/rankme is 40" in found.value
    assert found.fix == "optim.lr=0.0008"


def test_a_rank_that_falls_with_an_ema_teacher(tmp_path: Path) -> None:
    ranks = {"evaluation/ema/rankme": ramp(100, 40, 10)}
    make_run(tmp_path, "moco", ["recipe.ema.start=0.99", "recipe.ema.end=0.99"], evaluated=ranks)
    settings = settings_in(str(problem(tmp_path, "rank").fix))
    assert settings == ["recipe.ema.start=0.998", "recipe.ema.end=0.998"]


@pytest.mark.parametrize("kind", ["run", "stage"])
def test_ranks_of_other_micro_batches_do_not_count(tmp_path: Path, kind: str) -> None:
    facts = {"name": "mae", "total_steps": STEPS, "world_size": 2} | {"image_size": 256, "micro_batch_size": 8}
    change = {"kind": kind, "step": 500, "time": TIME} | facts
    ranks = {"health/pooled_rank": [100.0] * 50 + [50.0] * 50}
    assert not is_fine(make_run(tmp_path, logged=ranks), "rank")
    assert is_fine(make_run(tmp_path, logged=ranks, lines=[change]), "rank")
    (found,) = judged(make_run(tmp_path, logged=ranks, lines=[change | {"step": 900}]), "rank")
    assert found.value.startswith(NOT_JUDGED)


def test_a_rank_that_rises(tmp_path: Path) -> None:
    ranks = {"evaluation/student/rankme": ramp(50, 100, 10)}
    logged = {"health/pooled_rank": ramp(100, 10)}  # does not count if there is RankMe
    assert is_fine(make_run(tmp_path, logged=logged, evaluated=ranks), "rank")


@pytest.mark.parametrize("falls", [True, False])
def test_the_rank_of_training_batches_counts_after_the_warmup(tmp_path: Path, falls: bool) -> None:
    ranks = [500.0] * 10 + (ramp(100, 20, 90) if falls else constant(60)[10:])
    make_run(tmp_path, logged={"health/pooled_rank": ranks})
    assert is_fine(tmp_path, "rank") != falls
    assert not falls or "health/pooled_rank" in problem(tmp_path, "rank").value


@pytest.mark.parametrize(
    ("backbone", "setting"),
    [
        (["backbone.preset=dinov2-g/14"], ["backbone.preset=dinov2-reg-g/14"]),
        (["backbone.preset=vit-b/16"], []),
        (["backbone={from_pretrained: /data/model}"], []),
    ],
)
def test_high_norm_tokens_need_registers(tmp_path: Path, backbone: list[str], setting: list[str]) -> None:
    make_run(tmp_path, overrides=backbone, evaluated={"evaluation/student/high_norm_tokens": ramp(0, 0.04, 10)})
    (found,) = judged(tmp_path, "high_norm_tokens")
    assert found.warning
    assert settings_in(str(found.fix)) == setting
    assert setting or "a backbone with registers" in str(found.fix)
    load_run(str(tmp_path / "run.yaml"), setting)


def test_too_few_evaluations_name_the_setting_for_more(tmp_path: Path) -> None:
    def fix(*overrides: str) -> str:
        few = {f"evaluation/student/{name}": [0.1] * 5 for name in ("rankme", "high_norm_tokens")}
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        make_run(tmp_path, "mae", overrides, evaluated=few)
        (item,) = judged(tmp_path, "high_norm_tokens")
        assert item.value.startswith(NOT_JUDGED)
        return str(item.fix)

    assert fix().startswith("evaluation.online.data=")
    online = "evaluation.online={data: /data/shards/val, train_data: /data/shards/train"
    for measured in ("", ", metrics: [rankme, patches]"):
        every = fix(f"{online}{measured}}}").partition("evaluation.online.every_steps=")[2]
        assert STEPS // int(every) >= 2 * EVALUATIONS
    assert "every_steps" not in fix(f"{online}, every_steps: 100}}")  # the run is young
    assert fix(f"{online}, metrics: [knn]}}") == "evaluation.online.metrics=[knn, patches]"


@pytest.mark.parametrize(
    "backbone", ["{preset: dinov3-s/16}", "{preset: dinov2-reg-s/14}", "{from_pretrained: a/dinov2-with-registers}"]
)
def test_high_norm_tokens_in_spite_of_registers(tmp_path: Path, backbone: str) -> None:
    tokens = {"evaluation/student/high_norm_tokens": ramp(0, 0.04, 10)}
    (found,) = judged(make_run(tmp_path, overrides=[f"backbone={backbone}"], evaluated=tokens), "high_norm_tokens")
    assert "patch-level" in str(found.fix)


@pytest.mark.parametrize("tokens", [ramp(0, 0.008, 10), ramp(0.03, 0.02, 10)], ids=["few", "falling"])
def test_few_high_norm_tokens(tmp_path: Path, tokens: list[float]) -> None:
    assert is_fine(make_run(tmp_path, evaluated={"evaluation/ema/high_norm_tokens": tokens}), "high_norm_tokens")


def test_patches_that_become_alike(tmp_path: Path) -> None:
    similar = {"evaluation/ema/patch_similarity": [0.3, 0.1, 0.1, 0.1, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5]}
    found = problem(make_run(tmp_path, evaluated=similar), "patch_similarity")
    assert "kind: gram" in str(found.fix)
    assert settings_in(str(found.fix)) == ["optim.steps=500"]  # above 0.3 from step 600 on


def test_more_gram_anchoring(tmp_path: Path) -> None:
    similar = {"evaluation/ema/patch_similarity": ramp(0.1, 0.5, 10)}
    make_run(tmp_path, "continue_images", ["backbone.from_pretrained=/data/model"], evaluated=similar)
    (found,) = judged(tmp_path, "patch_similarity")
    assert found.fix == "recipe.targets.2.weight=4"
    schedule = "recipe.targets.2.weight=[[0, 0], [1, 2]]"
    make_run(tmp_path, "continue_images", ["backbone.from_pretrained=/data/model", schedule], evaluated=similar)
    (found,) = judged(tmp_path, "patch_similarity")
    assert found.fix == "larger values in the schedule recipe.targets.2.weight"


@pytest.mark.parametrize("recipe", ["moco", "clip", "masked_global"])
def test_image_level_targets_make_patches_alike(tmp_path: Path, recipe: str) -> None:
    make_run(tmp_path, recipe, evaluated={"evaluation/ema/patch_similarity": ramp(0.1, 0.5, 10)})
    (found,) = judged(tmp_path, "patch_similarity")
    assert found.value.startswith("not judged: the recipe has no patch-level target")


def test_a_patch_similarity_that_changes_little(tmp_path: Path) -> None:
    assert is_fine(
        make_run(tmp_path, evaluated={"evaluation/ema/patch_similarity": ramp(0.1, 0.25, 10)}), "patch_similarity"
    )


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("recipe", "overrides", "setting"),
    [
        ("mae", ["optim.batch_size=64", "optim.micro_batch_size=64"], "optim.lr=0.0003"),  # 8 times the square root
        ("mae", ["optim.batch_size=256"], None),  # 4 times
        ("mae", ["optim.batch_size=512", "optim.lr=2e-4"], None),
        ("mae", ["name=mine", "optim.lr=1e-4"], "optim.lr=0.0024"),
        ("mae", ["optim.batch_size=1024"], None),
        ("mae", ["optim.batch_size=1024", "optim.lr=6e-4"], None),
        ("mae", ["optim.batch_size=16384", "optim.lr=0.03"], "optim.lr=0.0048"),
        ("m3i", ["optim.batch_size=64", "optim.lr=1e-3"], None),  # like m3i_mini
        ("m3i", ["optim.batch_size=64", "optim.lr=1e-2"], "optim.lr=0.0005"),
        ("m3i_mini", ["name=mine", "optim.lr=1e-3"], None),
    ],
)
def test_learning_rates(tmp_path: Path, recipe: str, overrides: list[str], setting: str | None) -> None:
    make_run(tmp_path, recipe, overrides)
    if setting is None:
        assert is_fine(tmp_path, "learning_rate")
    else:
        assert settings_in(str(problem(tmp_path, "learning_rate").fix)) == [setting]


@pytest.mark.parametrize("name", sorted(known_runs().keys() - known_protocols().keys()))
def test_learning_rates_of_built_in_configs(tmp_path: Path, name: str) -> None:
    assert is_fine(make_run(tmp_path, name), "learning_rate")


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("mae", ["backbone={from_pretrained: /data/model}", "optim.lr=1e-6"]),
        ("mae", ["recipe.name=mine", "optim.lr=1e-6"]),
        ("in1k_finetune_b", ["optim.lr=1e-6", "backbone={from_pretrained: /data/model}"]),
    ],
    ids=["continued", "another method", "fine-tuning"],
)
def test_learning_rates_without_a_built_in_config(tmp_path: Path, recipe: str, overrides: list[str]) -> None:
    (found,) = judged(make_run(tmp_path, recipe, overrides), "learning_rate")
    assert found.value.startswith(NOT_JUDGED)


@pytest.mark.parametrize(
    ("temperature", "evenness", "is_problem"),
    [
        ("0.02", 0.9, True),
        ("0.04", 0.9, False),
        ("0.04", 0.2, True),
        ("[[0, 0.03], [0.1, 0.07]]", 0.2, False),
        ("0.07", 0.2, False),
    ],
)
def test_teacher_temperatures(tmp_path: Path, temperature: str, evenness: float, is_problem: bool) -> None:
    key, name = (
        "recipe.targets.0.regularizer.target_temperature",
        load_run("masked_global").recipe["targets"][0]["name"],
    )
    logged = {f"health/{name}_evenness": ramp(0.9, evenness)}
    make_run(tmp_path, "masked_global", [f"{key}={temperature}"], logged=logged)
    if is_problem:
        assert f"{key}=[[0, 0.04], [0.06, 0.07]]" in str(problem(tmp_path, "teacher_temperature").fix)
    else:
        assert is_fine(tmp_path, "teacher_temperature")


def test_a_recipe_without_prototypes_has_no_teacher_temperature(tmp_path: Path) -> None:
    (found,) = judged(make_run(tmp_path), "teacher_temperature")
    assert found.value.startswith("not judged: no target of the recipe has a teacher temperature")


def test_too_many_epochs(tmp_path: Path) -> None:
    epochs = {"dataset/photos/epoch": ramp(30, 1500, 50)}  # half of the run
    found = problem(make_run(tmp_path, logged=epochs), "epochs")
    assert "photos: 3,000.0 epochs" in found.value
    assert "optim.steps=100 optim.warmup_steps=10" in str(found.fix)
    make_run(tmp_path, overrides=["stages=[{steps: 400}, {steps: 600, image_size: 256}]"], logged=epochs)
    (found,) = judged(tmp_path, "epochs")
    assert "optim.steps=100" in str(found.fix)
    assert "stages" in str(found.fix)


def test_few_epochs_and_datasets_with_a_limit(tmp_path: Path) -> None:
    make_run(tmp_path, logged={"dataset/photos/epoch": ramp(1, 100)})
    assert is_fine(tmp_path, "epochs")
    make_run(
        tmp_path, overrides=["data.datasets.photos.epochs=1999"], logged={"dataset/photos/epoch": ramp(30, 1500, 50)}
    )
    assert is_fine(tmp_path, "epochs")


def test_overfitting(tmp_path: Path) -> None:
    accuracy = {"evaluation/ema/knn": [0.1, 0.3, 0.5, 0.5, 0.5, 0.49, 0.48, 0.47, 0.46, 0.45]}
    make_run(tmp_path, evaluated=accuracy)
    found = problem(tmp_path, "overfitting")
    assert "0.500 at step 300" in found.value
    keep_best = "checkpoint.keep_best={metric: evaluation/ema/knn, mode: max}"
    assert settings_in(str(found.fix)) == [keep_best]
    make_run(tmp_path, overrides=[keep_best], evaluated=accuracy)
    assert settings_in(str(problem(tmp_path, "overfitting").fix)) == ["optim.steps=300"]


@pytest.mark.parametrize(("count", "fine"), [(20, True), (20_000, False)])
def test_a_fall_within_the_sampling_error_is_no_overfitting(tmp_path: Path, count: int, fine: bool) -> None:
    accuracy = {"evaluation/ema/knn": [0.1, 0.3, 0.5, 0.45, 0.45, 0.45, 0.45], "evaluation/online_labeled": [count] * 7}
    make_run(tmp_path, evaluated=accuracy)
    assert is_fine(tmp_path, "overfitting") == fine


@pytest.mark.parametrize(
    ("accuracy", "loss"),
    [(ramp(0.1, 0.5, 10), ramp(2, 1)), ([*ramp(0.1, 0.5, 8), 0.4, 0.4], ramp(2, 1)), (ramp(0.5, 0.1, 10), ramp(1, 2))],
    ids=["rises", "falls in two evaluations only", "falls with a loss that rises"],
)
def test_no_overfitting(tmp_path: Path, accuracy: list[float], loss: list[float]) -> None:
    make_run(tmp_path, logged={"loss": loss}, evaluated={"evaluation/student/linear": accuracy})
    assert is_fine(tmp_path, "overfitting")


def test_features_that_are_worse_than_the_initial_weights(tmp_path: Path) -> None:
    make_run(tmp_path, lines=[evaluation(100 * row, 0.5 - 0.03 * row) for row in range(5)])
    found = problem(tmp_path, "overfitting")
    assert found.why == "the features are worse than the initial weights"
    assert found.fix == "optim.lr=0.0008"


@pytest.mark.parametrize(("newest", "count", "fine"), [(0.45, 1_000, True), (0.31, 1_000, False), (0.45, 10, False)])
def test_features_no_better_than_random_weights(tmp_path: Path, newest: float, count: int, fine: bool) -> None:
    lines = [
        evaluation(100 * row, 0.3 if row < 4 else newest) | {"evaluation/online_labeled": count} for row in range(5)
    ]
    make_run(tmp_path, lines=lines)
    assert is_fine(tmp_path, "improvement") == fine
    if not fine:
        assert "0.300 at step 0" in problem(tmp_path, "improvement").value


def evaluation(step: int, accuracy: float) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "time": TIME, "evaluation/student/knn": accuracy}


# ------------------------------------------------------------------ missing data


def test_an_error_in_a_rule_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Any) -> Any:
        raise UserError("the preset is unknown", fix="another one")

    monkeypatch.setattr(diagnosis, "RULES", (broken, *RULES))
    first, *others = diagnose(make_run(tmp_path))
    assert (first.value, first.why, first.fix) == ("not judged: the preset is unknown", None, "another one")
    assert len(others) == len(RULES)


def test_a_recipe_with_user_defined_classes(tmp_path: Path) -> None:
    make_run(tmp_path, overrides=["recipe.targets.0.kind=nowhere.mine:Target"])
    assert is_fine(tmp_path, "warnings")
    assert judged(tmp_path, "teacher_temperature")[0].value.startswith(NOT_JUDGED)


def test_every_rule_has_one_line_for_a_run_without_records(tmp_path: Path) -> None:
    make_run(tmp_path, logged={"loss": []})
    findings = diagnose(tmp_path)
    assert [item.check for item in findings] == [rule.__name__ for rule in RULES]
    assert all(item.ok and not item.warning for item in findings)
    online = [item for item in findings if item.fix and "online" in item.fix]
    assert {item.check for item in online} == {
        "improvement",
        "rank",
        "high_norm_tokens",
        "patch_similarity",
        "overfitting",
    }
    after = load_run(str(tmp_path / "run.yaml"), [str(online[0].fix)]).evaluation.online
    assert after is not None
    assert after.data == "/data/shards/val"
    assert {item.fix for item in online} == {online[0].fix}


def test_records_without_a_config_file(tmp_path: Path) -> None:
    make_run(tmp_path, logged={"dataset/photos/epoch": ramp(1, 5)}, evaluated={"evaluation/ema/knn": ramp(0, 0.5, 10)})
    (tmp_path / "run.yaml").unlink()
    fine = {item.check for item in diagnose(tmp_path) if not item.value.startswith(NOT_JUDGED)}
    assert fine == {"warnings", "epochs", "overfitting"}


# ------------------------------------------------------------------ the command


def test_the_command_gives_advice_with_exit_code_0(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert all(row.keys() == KEYS and row["host"] == "photos-vit-l" for row in rows)
    assert [row["check"] for row in rows if row["warning"]] == ["warnings"]
    skipped = [row for row in rows if row["value"].startswith("not judged: ")]
    assert len(skipped) == 6
    assert all(row["ok"] and row["why"] is None for row in skipped)
    printed = CliRunner().invoke(app, ["doctor", str(tmp_path / "run")])
    assert printed.exit_code == 0
    assert "2 ✓, 1 !, 0 ✗, 6 –" in printed.stdout


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    error = CliRunner().invoke(app, ["doctor", str(tmp_path)]).exception
    assert isinstance(error, ConfigError)
    assert error.exit_code == 2
    assert error.fix


@pytest.mark.parametrize("options", [["optim.lr=1"], ["--hosts", "a"], ["--env", "A=1"], ["--connect-timeout", "3"]])
def test_options_without_effect_on_a_diagnosis_are_errors(tmp_path: Path, options: list[str]) -> None:
    error = CliRunner().invoke(app, ["doctor", str(make_run(tmp_path)), *options]).exception
    assert isinstance(error, ConfigError)
    assert options[0] in str(error)


def test_nodes_are_still_checked_with_the_same_document(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [finding("disk", "a", "1 GiB"), finding("disk", "b", "0 GiB", error="full", fix="remove files")]
    monkeypatch.setattr(command, "examine", lambda *arguments, **options: findings)
    done = CliRunner().invoke(app, ["doctor", "mae", "--json"])
    assert done.exit_code == 2
    rows = json.loads(done.stdout)
    assert [(row["host"], row["ok"]) for row in rows] == [("a", True), ("b", False)]
    assert rows[0].keys() == KEYS
