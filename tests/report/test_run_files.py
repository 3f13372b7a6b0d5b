"""What a run's folder tells: of one with everything, of one that has barely begun, and of what is no run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folder import write_run

from m3i_scale.errors import CheckpointError, ConfigError, UserError
from m3i_scale.host.failures import read_attempts, read_failure
from m3i_scale.host.output_dir import lock_directory
from m3i_scale.report.charts import downsample
from m3i_scale.report.run_files import RunReader, checkpoints_of, quarantine_of, ranks_of, read_run

END = {"kind": "end", "step": 100, "time": "2030-01-01T13:00:00.000+00:00", "status": "preempted"}
START = {"kind": "run", "step": 100, "time": "2030-01-01T14:00:00.000+00:00", "name": "b", "total_steps": 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "full")


def write_lines(folder: Path, *lines: dict[str, Any]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_with_everything(folder: Path) -> None:
    run = read_run(folder)
    assert (run.name, run.step, run.total_steps, run.status) == ("photos-vit-l", 2000, 2000, "finished")
    assert [start["step"] for start in run.starts] == [0, 500]
    assert run.settings["optim"]["steps"] == 2000
    assert (len(run.warnings), len(run.rewinds), len(run.evaluations), run.unreadable) == (1, 1, 10, 0)
    assert {name: len(values) for name, values in run.figures.items()} == dict.fromkeys(run.figures, 200)
    assert np.isinf(run.figures["grad_norm"]).nonzero()[0].tolist() == [4]
    assert np.diff(run.times_s) == pytest.approx(19.0)


def test_a_run_that_has_begun_and_logged_nothing(tmp_path: Path) -> None:
    with lock_directory(tmp_path):
        run = read_run(tmp_path)
    assert (run.name, run.step, run.total_steps, run.status) == (tmp_path.name, 0, None, None)
    assert (len(run.steps), run.figures, run.settings) == (0, {}, {})
    (tmp_path / "run.yaml").write_text("optim: {steps: 9}")
    assert read_run(tmp_path).total_steps == 9


def test_an_end_that_was_gone_on_from_is_none(tmp_path: Path) -> None:
    start = START | {"world_size": 1}
    assert read_run(write_lines(tmp_path, END)).status == "preempted"
    resumed = read_run(write_lines(tmp_path, END, start))
    assert (resumed.status, resumed.step, resumed.name) == (None, 100, "b")


def test_what_a_run_adds_is_read_later(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    growing = tmp_path / "metrics.jsonl"
    growing.write_text("".join(lines[:80]))
    reader = RunReader(tmp_path)
    before = reader.read()
    with growing.open("a") as stream:
        stream.writelines(lines[80:])
    now = reader.read()
    assert len(before.steps) < 80
    assert now.steps.tolist() == read_run(folder).steps.tolist()


def _nothing(folder: Path) -> None:
    pass


def _a_folder_for_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").mkdir()
    (folder / "checkpoints").mkdir()


@pytest.mark.parametrize("spoil", [_nothing, _a_folder_for_metrics])
def test_what_is_no_run_is_refused(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path)
    with pytest.raises(ConfigError) as refused:
        read_run(tmp_path)
    assert str(tmp_path) in str(refused.value.where)


def test_a_run_file_that_is_torn_is_a_fault_beside_the_rest(tmp_path: Path) -> None:
    write_lines(tmp_path, END)
    (tmp_path / "run.yaml").write_text("a: [")
    run = read_run(tmp_path)
    assert run.settings_error is not None
    assert (run.settings, run.status) == ({}, "preempted")


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for name in ("none", "longer than a name can be" * 20):
        with pytest.raises(ConfigError):
            read_run(tmp_path / name)


# ------------------------------------------------------------------ what lies beside the figures


def test_checkpoints_and_what_keeps_them(folder: Path) -> None:
    rows = checkpoints_of(read_run(folder))["checkpoints"]
    assert [row["step"] for row in rows] == [2000, 1500, 1000]
    assert [len(row["kept_by"]) for row in rows] == [2, 1, 0]  # latest and best, latest, nothing


def test_checkpoints_that_may_not_be_read_are_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    run = read_run(folder)
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(CheckpointError) as refused:
        checkpoints_of(run)
    assert refused.value.where == str(folder / "checkpoints")


def test_the_time_left_is_that_of_the_last_records(folder: Path, tmp_path: Path) -> None:
    assert read_run(folder).left_s is None
    start = START | {"step": 0, "world_size": 1}
    steps = [
        {"kind": "train", "step": step, "time": START["time"], "time/step": step_s}
        for step, step_s in enumerate([*[90.0] * 80, *[2.0] * 19, "nan"], 1)
    ]
    assert read_run(write_lines(tmp_path, start)).left_s is None
    assert (
        read_run(write_lines(tmp_path, start, *steps, END | {"time": "2030-01-01T15:00:00.000+00:00"})).left_s is None
    )
    assert read_run(write_lines(tmp_path, start, *steps)).left_s == pytest.approx(2.0 * 100)


def test_quarantine_is_counted_by_reason_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    entry = {"source": "a", "url": "/data/a.tar", "key": "1", "offset": 0, "reason": "no image", "detail": ""}
    lines = [*(entry | {"key": str(key)} for key in range(9)), entry | {"reason": "torn"}, entry | {"offset": "0"}, [1]]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "quarantine.jsonl").write_text(f'{text}\n{{"source": "a"}}\n{"[" * 9_000}\n\0\0\n{{"sour')
    found = quarantine_of(tmp_path)
    assert {reason: of_reason.count for reason, of_reason in found.items()} == {"no image": 9, "torn": 1}
    assert found["no image"].example["key"] == "0"


def test_attempts_name_lost_hosts_and_the_cause(folder: Path) -> None:
    first, second = read_attempts(folder)
    assert (first.lost, second.lost) == (["node1"], [])
    assert first.cause is not None
    assert first.cause.host == "node1"
    assert read_failure(folder) is None


@pytest.mark.parametrize("name", ["attempts.json", "failure.json"])
@pytest.mark.parametrize("content", ["", "[{}]", '{"cause": 1}', "[" * 9_000])
def test_documents_that_are_none_are_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as refused:
        _ = read_attempts(tmp_path), read_failure(tmp_path)
    assert refused.value.where == str(tmp_path / name)


def test_ranks_are_heard_of_by_what_they_print(tmp_path: Path) -> None:
    for attempt, host, rank in ((1, "old", 0), (2, "b-1", 1), (2, "a", 0)):
        path = tmp_path / "logs" / f"{attempt:03d}" / f"{host}-rank{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("…")
        os.utime(path, (0, 1000 + rank))
    assert [(sign.host, sign.rank, sign.heard_s) for sign in ranks_of(tmp_path)] == [("a", 0, 1000), ("b-1", 1, 1001)]


def test_ranks_that_have_begun_and_not_ended(tmp_path: Path) -> None:
    notes = [{"rank": 0, "began": 5.0}, {"rank": 1, "began": 6.0}, {"rank": 0, "ended": 9.0}, {"rank": "2"}]
    (tmp_path / "failure").mkdir()
    (tmp_path / "failure" / "host-a.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    assert [(sign.host, sign.rank, sign.heard_s) for sign in ranks_of(tmp_path)] == [("a", 1, 6.0)]


# ------------------------------------------------------------------ fewer points


def test_a_thinned_curve_keeps_its_spikes_and_ends() -> None:
    steps = np.arange(100_000)
    values = np.sin(steps / 10_000)
    values[[31_234, 77_777]] = 50.0, -50.0
    x, y = downsample(steps, values, 500)
    assert len(x) == len(y) <= 500
    assert {0, 31_234, 77_777, 99_999} <= set(x.tolist())
    np.testing.assert_array_equal(y, values[x])


def test_a_short_curve_stays_and_loses_what_is_not_finite() -> None:
    x, y = downsample(np.arange(5), np.array([1.0, np.nan, np.inf, 4.0, 5.0]), 500)
    assert (x.tolist(), y.tolist()) == ([0, 3, 4], [1.0, 4.0, 5.0])
