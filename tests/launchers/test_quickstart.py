"""The quickstart's own logic: stamps, the moment of the kill, the kill, and what a machine lacks."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import _evaluation
import psutil
import pytest
import torch
from _count import count, read_suites, slowest, unfinished
from _evaluation import MEASURES, results, results_table, write_random_weights
from _quickstart import EVALUATION_CODE, EXPORT_CODE, RELOAD_CODE, REPORT_CODE, TRAINING_CODE, Stages, make_shards
from _training import Training, TrainingPlan, half_way, kill_all, read_lines
from rich.console import Console
from safetensors.torch import load_file, save_file

from m3i_scale.config import load_run
from m3i_scale.errors import DataError, UserError

ROOT = Path(__file__).resolve().parents[2]
RUN_FILE = str(ROOT / "launchers" / "quickstart.yaml")


def a_run(tmp_path, *overrides):
    return load_run(RUN_FILE, [f"output_dir={tmp_path}", *overrides])


def test_the_run_file_leaves_room_for_the_kill(tmp_path):
    run = a_run(tmp_path)
    middle = half_way(run)
    assert run.optim.steps / 2 <= middle < run.optim.steps
    assert middle % run.checkpoint.every_steps == 0


@pytest.mark.parametrize(("steps", "every", "middle"), [(400, 100, 200), (10, 2, 6), (90, 30, 60), (100, 40, 80)])
def test_half_way_is_the_first_checkpoint_at_or_after_the_middle(tmp_path, steps, every, middle):
    overrides = [f"optim.steps={steps}", "optim.warmup_steps=1", f"checkpoint.every_steps={every}", "log.every_steps=1"]
    assert half_way(a_run(tmp_path, *overrides)) == middle


def test_no_room_for_a_kill_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing is logged between"):
        half_way(a_run(tmp_path, "optim.steps=100", "checkpoint.every_steps=60", "log.every_steps=50"))


def test_kill_takes_the_whole_family():
    script = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    process = subprocess.Popen([sys.executable, "-c", script + "time.sleep(600)"], start_new_session=True)
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 300
    while not parent.children() and time.monotonic() < deadline:
        time.sleep(0.02)
    (child,) = parent.children()
    assert kill_all(process) == 2
    assert process.returncode == -9
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert kill_all(process) == 0  # once more does no harm


def test_a_training_that_ends_by_itself_is_an_error(tmp_path):
    training = Training(TrainingPlan(RUN_FILE, ["no_such_key=1"], a_run(tmp_path), 2))
    with pytest.raises(UserError, match="ended by itself with exit code 2"):
        training.until_killed()


def lines(path, *records):
    path.write_text("".join(json.dumps({"kind": "train", "step": step, "loss": loss}) + "\n" for step, loss in records))


def test_lost_steps_are_compared_to_the_bit(tmp_path):
    run = a_run(tmp_path, "log.every_steps=10")
    training = Training(TrainingPlan(RUN_FILE, [], run, 2))
    lines(training.metrics, (200, 5.0), (210, 4.5), (220, 4.25))
    lines(training.replaced, (210, 4.5), (220, 4.25))
    assert training._repeated(200) == "2 lost records repeated: bit-identical"
    lines(training.replaced, (210, 4.5), (220, 4.250000000000001))
    with pytest.raises(UserError) as caught:
        training._repeated(200)
    assert str(caught.value.where).endswith("/metrics.replaced.jsonl")
    assert "step 220" in caught.value.what


def test_a_torn_line_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert read_lines(path) == [{"kind": "train", "step": 1}]


def test_a_stage_is_done_once_per_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    calls = []

    def go(inputs, *, present=True):
        stages = Stages(tmp_path / "stamps")
        key = stages.key(inputs, ("m3i_scale/exports",))
        stages.run("one", "x", tmp_path, lambda: calls.append(inputs) or ["figure"], key, present=present)
        return stages.rows[0]

    first, second = go({"a": 1}), go({"a": 1})
    assert (first.again, second.again) == (False, True)
    assert second.figures == ["figure"]
    assert second.seconds == first.seconds
    go({"a": 2})
    go({"a": 2}, present=False)
    assert calls == [{"a": 1}, {"a": 2}, {"a": 2}]


def test_a_stage_depends_on_the_one_before_and_on_its_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    room = tmp_path / "m3i_scale" / "exports"
    room.mkdir(parents=True)
    (room / "a.py").write_text("1")
    stages = Stages(tmp_path / "stamps")
    key = stages.key({}, ("m3i_scale/exports",))
    stages.before = "other"
    assert stages.key({}, ("m3i_scale/exports",)) != key
    stages.before = ""
    assert stages.key({}, ("m3i_scale/exports",)) == key
    (room / "a.py").write_text("2")
    assert stages.key({}, ("m3i_scale/exports",)) != key
    whole, one = stages.key({}, ("m3i_scale/exports",)), stages.key({}, ("m3i_scale/exports/a.py",))
    assert whole == one
    (room / "b.py").write_text("3")
    assert stages.key({}, ("m3i_scale/exports",)) != whole
    assert stages.key({}, ("m3i_scale/exports/a.py",)) == one


def test_a_failed_stage_leaves_no_stamp(tmp_path):
    stages = Stages(tmp_path / "stamps")
    with pytest.raises(ZeroDivisionError):
        stages.run("one", "x", tmp_path, lambda: [str(1 // 0)], "key")
    assert stages.done("one", "key") is None


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no shards"):
        make_shards(tmp_path)


def test_all_code_that_stages_depend_on_exists():
    for code in (TRAINING_CODE, EXPORT_CODE, EVALUATION_CODE, RELOAD_CODE, REPORT_CODE):
        assert all((ROOT / path).exists() for path in code), code


def test_random_weights_replace_the_trained_ones(tmp_path, monkeypatch):
    initial = {"student.model.a": torch.ones(2), "text.model.b": torch.ones(3), "pool.c": torch.ones(4)}
    trained = {".": "a", "text": "b", "heads": "pool.c"}
    for folder, name in trained.items():
        (tmp_path / "export" / folder).mkdir(parents=True, exist_ok=True)
        save_file({name: torch.zeros(1)}, tmp_path / "export" / folder / "model.safetensors")
    (tmp_path / "export" / "export.json").write_text("{}")
    monkeypatch.setattr(_evaluation, "build_objective", lambda run: SimpleNamespace(state_dict=lambda: initial))
    write_random_weights(a_run(tmp_path), tmp_path / "export", tmp_path / "random")
    for folder, name in trained.items():
        weights = load_file(tmp_path / "random" / folder / "model.safetensors")
        assert list(weights) == [name]
        assert weights[name].sum() == weights[name].numel() > 1
    assert not (tmp_path / "random" / "export.json").exists()  # it is no export of the run


def write_results(folder, *, over_random, over_pixels):
    def estimate(low):
        return {"value": low + 0.1, "low": low, "high": low + 0.2}

    by_name = {measure.name: {measure.label: estimate(0.3)} for measure in MEASURES if measure.is_probe}
    gains = {measure.name: {measure.label: estimate(over_pixels)} for measure in MEASURES if measure.is_probe}
    chances = {way: {"R@10": {"chance": 0.006}} for way in ("image_to_text", "text_to_image")}
    compared = {"before": estimate(0.1), "after": estimate(0.4), "difference": estimate(over_random)}
    evaluation = {"measures": {"retrieval": chances}, "baseline": {"measures": by_name, "advantage_of_model": gains}}
    comparison = {"sets": {"data": {"measures": {f"{measure.name} {measure.label}": compared for measure in MEASURES}}}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "comparison.json").write_text(json.dumps(comparison))


def test_a_gain_is_clear_beyond_both_intervals(tmp_path):
    write_results(tmp_path, over_random=0.05, over_pixels=-0.01)
    clear = {row.title for row in results(tmp_path) if row.is_clear}
    assert clear == {row.title for row in results(tmp_path) if row.pixels is None}  # raw pixels read no text
    write_results(tmp_path, over_random=0.05, over_pixels=0.01)
    assert all(row.is_clear for row in results(tmp_path))
    write_results(tmp_path, over_random=-0.01, over_pixels=0.01)
    assert not any(row.is_clear for row in results(tmp_path))


def test_the_table_of_results_names_the_picture_and_all_metrics(tmp_path):
    write_results(tmp_path, over_random=0.05, over_pixels=0.01)
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(results_table(tmp_path))
    text = console.export_text()
    assert "dense_pca.jpg" in text
    assert all(row.title in text for row in results(tmp_path))
    assert "+0.150 (+0.050 … +0.250)" in text


def test_reports_add_up():
    reports = [
        '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2">'
        '<testcase classname="a" name="quick" time="0.5"/>'
        '<testcase classname="a" name="slow" time="70"/></testsuite></testsuites>',
        '<testsuites><testsuite tests="1" failures="0" errors="0" skipped="0">'
        '<testcase classname="b" name="slower" time="80.25"/></testsuite></testsuites>',
        "",
    ]
    suites = read_suites(reports)
    assert count(suites) == "tests: 6 passed, 2 failed, 2 skipped"
    assert [line.split() for line in slowest(suites)] == [
        ["80.2", "s", "b::slower"],
        ["70.0", "s", "a::slow"],
        ["0.5", "s", "a::quick"],
    ]
    assert count(read_suites([""])) == "tests: 0 passed, 0 failed, 0 skipped"
    assert unfinished(reports) == f"; 1 of {len(reports)} reports were never finished"
    assert unfinished(reports[:-1]) == ""


def machine_with(tmp_path, *commands):
    """A folder with links to a few commands only, as PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for command in ("bash", "dirname", "df", "awk", "id", *commands):
        found = subprocess.run(["which", command], capture_output=True, text=True, check=True).stdout.strip()
        (folder / command).symlink_to(found)
    return str(folder)


def test_all_that_a_machine_lacks_is_said_at_once(tmp_path):
    environment = {"PATH": machine_with(tmp_path), "M3I_EMOJI_FOLDER": str(tmp_path / "none")}
    done = subprocess.run(
        [str(tmp_path / "bin" / "bash"), str(ROOT / "launchers" / "quickstart.sh")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    for what in ("no Python 3.10 or newer", "g++ is missing", "npm is missing", "apt-get is missing"):
        assert what in done.stderr
    for mend in ("apt-get install g++", "apt-get install npm", "PYTHON=/path/to/python3"):
        assert mend in done.stderr


def test_too_little_disk_and_an_old_python_are_said(tmp_path):
    path = machine_with(tmp_path)
    (tmp_path / "bin" / "df").unlink()
    for name, text in {
        "df": "#!/bin/bash\nprintf 'h\\nx 1 1 999999 1%% /\\n'",
        "python-3.9": "#!/bin/bash\nexit 1",
    }.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": path, "PYTHON": "python-3.9"}
    done = subprocess.run(
        [str(tmp_path / "bin" / "bash"), str(ROOT / "launchers" / "quickstart.sh")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no Python 3.10 or newer at PYTHON=python-3.9" in done.stderr
    assert "0 GB of disk are free" in done.stderr


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "_environment.sh"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(ROOT / "launchers" / script)], check=True)


def test_launchers_and_the_build_can_be_started():
    for script in ("launchers/quickstart.sh", "launchers/test.sh", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK), script
