"""Reading metrics.jsonl: exact, whole, and not to be thrown by what a crash or an attacker leaves in it."""

from __future__ import annotations

import json
import math
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3i_scale.files import json_line
from m3i_scale.report import metrics_file
from m3i_scale.report.metrics_file import MetricsFile

START = datetime(2030, 1, 1, tzinfo=timezone.utc)


def at(step: int) -> str:
    return (START + timedelta(milliseconds=1_901 * step)).isoformat(timespec="milliseconds")


def train(step: int, **figures: Any) -> str:
    return json_line({"kind": "train", "step": step, "time": at(step), **figures})


def figures(step: int) -> dict[str, Any]:
    """Some that differ in every digit; one that comes later, one that goes, one that is not always finite."""
    values: dict[str, Any] = {"loss": math.sqrt(step), "mi/text": -1 / 3 / step, "samples": 2**40 + step}
    values |= {"late": math.exp(-step)} if step > 400 else {"early": step / 7}
    return values | {"grad_norm": {300: math.nan, 301: math.inf, 302: -math.inf}.get(step, 0.1 * step)}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(metrics_file, "BLOCK_BYTES", 4_096)  # some twenty lines
    return tmp_path / "metrics.jsonl"


def read(path: Path, text: str | bytes) -> MetricsFile:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    file = MetricsFile(path)
    file.read_new_lines()
    return file


def test_every_number_is_exactly_that_of_the_file(path: Path) -> None:
    lines = [train(step, **figures(step)) for step in range(1, 601)]
    file = read(path, "".join(lines))
    logged, records = file.steps(), [json.loads(line) for line in lines]
    assert logged.steps.tolist() == [*range(1, 601)]
    assert logged.times_s.tolist() == [datetime.fromisoformat(record["time"]).timestamp() for record in records]
    assert set(logged.figures) == {"loss", "mi/text", "samples", "early", "late", "grad_norm"}
    for name, values in logged.figures.items():
        np.testing.assert_array_equal(values, [float(record.get(name, "nan")) for record in records])
    assert file.unreadable == 0


def test_most_lines_are_read_as_columns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    values = {"loss": 1.0, "lr": 1e-4}
    lines = [train(step, **values | ({"grad_norm": "nan"} if step > 300 else {"grad_norm": 1})) for step in range(600)]
    lines.insert(450, json_line({"kind": "evaluation", "step": 449, "time": at(449), "evaluation/loss": 2.5}))
    assert len(read(path, "".join(lines)).steps().steps) == 600
    assert len(parsed) < 60


def test_lines_of_other_kinds_are_kept_as_they_are(path: Path) -> None:
    start = {"kind": "run", "step": 0, "time": at(0), "name": "first", "total_steps": 9, "world_size": 2}
    warning = {"kind": "warning", "step": 1, "time": at(1), "group": "text", "what": "a", "why": "b", "fix": "c"}
    measured = {"kind": "evaluation", "step": 1, "time": at(1), "evaluation/loss": "nan", "evaluation/acc": 1}
    later = {"kind": "of a later version", "step": 1, "time": at(1), "x": [1]}
    file = read(path, "".join(map(json_line, [start, json.loads(train(1, loss=1.0)), warning, measured, later])))
    assert (file.records["run"], file.records["warning"], file.unreadable) == ([start], [warning], 0)
    assert math.isnan(file.records["evaluation"][0]["evaluation/loss"])
    assert file.records["evaluation"][0]["evaluation/acc"] == 1


GARBAGE = {
    "torn": b'{"kind": "train", "step": 100, "time": "2030-01',
    "two in one line": train(100, loss=1.0).strip().encode() + train(101, loss=1.0).strip().encode(),
    "torn into the next": b'{"kind": "train", "st' + train(100, loss=1.0).strip().encode(),
    "zeros": bytes(700),
    "zeros within": train(100, loss=1.0).strip().encode()[:-1] + b"\0\0}",
    "no object": b"[1, 2]",
    "no UTF-8": b'{"kind": "train", "step": 100, "time": "\xff\xfe"}',
    "deep lists": b'{"kind": "train", "step": 100, "loss": ' + b"[" * 2_000 + b"]" * 2_000 + b"}",
    "deep objects": b'{"kind": "warning", "step": 100, "a": ' + b'{"a":' * 600 + b"1" + b"}" * 601,
    "longer than a block": train(100, loss=1.0, text="x" * 10_000).strip().encode(),
    "step is a text": train(100, loss=1.0).strip().replace("100", '"100"', 1).encode(),
    "step is a fraction": train(100, loss=1.0).strip().replace("100", "100.5", 1).encode(),
    "step is negative": train(100, loss=1.0).strip().replace("100", "-100", 1).encode(),
    "step is beyond 64 bits": train(100, loss=1.0).strip().replace("100", "1" + "0" * 30, 1).encode(),
    "no step": b'{"kind": "train", "time": "2030-01-01T00:00:00.000+00:00", "loss": 1.0}',
    "step is null": train(100, loss=1.0).strip().replace("100", "null", 1).encode(),
    "time is none": b'{"kind": "train", "step": 100, "time": "noon", "loss": 1.0}',
    "a step for the second time": train(99, loss=1.0).strip().encode(),
    "a step before": train(7, loss=1.0).strip().encode(),
    "a warning of other types": json_line(
        {"kind": "warning", "step": 99, "time": at(99), "group": 1, "what": "", "why": "", "fix": ""}
    )
    .strip()
    .encode(),
    "a count beyond 64 bits": json_line(
        {"kind": "run", "step": 99, "time": at(99), "name": "a", "total_steps": 10**400, "world_size": 1}
    )
    .strip()
    .encode(),
    "a kind that is none": json_line({"kind": ["train"], "step": 99, "time": at(99)}).strip().encode(),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("among", ["columns", "first lines"])
def test_garbage_is_counted_and_all_else_is_read(path: Path, garbage: bytes, among: str) -> None:
    before = [train(step, loss=step / 3) for step in range(1 if among == "columns" else 99, 100)]
    after = [train(step, loss=step / 3) for step in range(101, 200)]
    file = read(path, "".join(before).encode() + garbage + b"\n" + "".join(after).encode())
    logged = file.steps()
    assert file.unreadable == 1
    assert logged.steps.tolist() == [*range(100 - len(before), 100), *range(101, 200)]
    assert logged.figures["loss"].tolist() == [step / 3 for step in logged.steps.tolist()]


def test_a_field_of_another_type_is_no_figure(path: Path) -> None:
    lines = [train(step, loss=[1] if step == 50 else 1.0, note="text") for step in range(1, 100)]
    file = read(path, "".join(lines))
    assert [*file.steps().figures] == ["loss"]
    assert np.flatnonzero(np.isnan(file.steps().figures["loss"])).tolist() == [49]


def test_a_whole_number_beyond_all_others_is_infinite(path: Path) -> None:
    huge = {1: 10**400, 99: -(10**400)}
    file = read(path, "".join(train(step, loss=huge.get(step, 1)) for step in range(1, 100)))
    assert file.steps().figures["loss"].tolist() == [math.inf, *[1.0] * 97, -math.inf]


def test_a_line_that_is_being_written_is_read_when_it_is_whole(path: Path) -> None:
    whole = train(2, loss=0.5)
    file = read(path, train(1, loss=1.0) + whole[:30])
    assert (file.steps().steps.tolist(), file.unreadable) == ([1], 0)
    with path.open("a") as stream:
        stream.write(whole[30:] + train(3, loss=0.25))
    file.read_new_lines()
    assert (file.steps().steps.tolist(), file.unreadable) == ([1, 2, 3], 0)
    assert file.steps().figures["loss"].tolist() == [1.0, 0.5, 0.25]


def test_what_has_been_read_is_not_read_again(path: Path) -> None:
    file = read(path, "".join(train(step, loss=1.0) for step in range(1, 100)))
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.write(b"x" * size)  # whoever reads it again sees no line
        stream.write(train(100, loss=2.0).encode())
    file.read_new_lines()
    assert file.steps().steps.tolist() == [*range(1, 101)]


@pytest.mark.parametrize("longer", [False, True])
def test_a_file_that_was_cut_back_is_read_anew(path: Path, longer: bool) -> None:
    file = read(path, "".join(train(step, loss=1.0) for step in range(1, 100)) + "garbage\n")
    again = path.with_name("again")
    again.write_text("".join(train(step, loss=2.0) for step in range(1, 300 if longer else 50)))
    os.replace(again, path)
    file.read_new_lines()
    assert file.steps().steps.tolist() == [*range(1, 300 if longer else 50)]
    assert (set(file.steps().figures["loss"]), file.unreadable) == ({2.0}, 0)


def test_figures_that_are_not_wanted_are_not_kept(path: Path) -> None:
    path.write_text("".join(train(step, loss=1.0, lr=1e-4) for step in range(1, 200)))
    file = MetricsFile(path, {"lr"}.__contains__)
    file.read_new_lines()
    assert [*file.steps().figures] == ["lr"]
    assert len(file.steps().figures["lr"]) == 199


def test_a_file_that_is_not_there_is_empty(path: Path) -> None:
    file = MetricsFile(path)
    file.read_new_lines()
    assert len(file.steps().steps) == 0
