"""The progress of a run on a terminal and in a file."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from callback_records import CONFIG, REWIND, info, record
from rich.console import Console

from m3i_scale.run.callbacks.progress import ProgressDisplay, smooth, summary


def show(terminal: bool, width: int = 200) -> tuple[ProgressDisplay, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, soft_wrap=True)
    return ProgressDisplay(console), stream


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    display, stream = show(terminal=False)
    display.on_start(info(tmp_path, start_step=10))
    groups = {"[odd]": {"loss": 1.5}, "intra": {"loss": 2.0}}
    display.on_step(record(20, {"quarantined": 3}, groups=groups))
    display.on_evaluation(20, {"text": {"loss": 1.25}})
    display.on_end("failed")
    assert stream.getvalue().splitlines() == [
        "step 20/100  ETA 0:02:40  loss 3.5 ([odd] 1.5, intra 2)  quarantined 3  lr 1.00e-03  "
        "data wait 25%  MFU 25.0%  3,136 tokens/s  32.0 samples/s",
        "step 20  evaluation  text/loss 1.25",
        "run failed",
    ]


@pytest.mark.parametrize("width", [80, 60, 200])
def test_a_bar_on_a_terminal(tmp_path: Path, width: int) -> None:
    display, stream = show(terminal=True, width=width)
    display.on_start(replace(info(tmp_path), total_steps=100_000))
    groups = {name: {"loss": 1.234} for name in ("dense", "text", "class", "inter")}
    display.on_step(record(40, {"time/step": 30.0}, groups=groups))
    display.on_end("failed")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n")
    assert shown.rstrip().endswith("run failed")
    frame = [line.rstrip() for line in shown[shown.rindex("step 40/100,000") :].splitlines() if line.strip()][:-1]
    assert all(len(line) <= width for line in frame)
    assert "ETA 34 days" in frame[0]
    told = " ".join(frame)
    for figure in ("dense 1.234", "inter 1.234", "lr 1.00e-03", "data wait", "MFU 25.0%", "tokens/s", "samples/s"):
        assert figure in told


@pytest.mark.parametrize("terminal", [True, False])
def test_steps_that_are_not_logged_are_seen_too(tmp_path: Path, terminal: bool) -> None:
    display, stream = show(terminal=terminal)
    display.on_start(info(tmp_path))
    for step in (1, 2, 3):
        display.on_progress(step)
    display.on_end("preempted")
    assert ("step 3/100" if terminal else "step 1/100") in stream.getvalue()
    assert ("ETA 0:" in stream.getvalue()) == terminal


def test_a_bar_goes_back_with_the_run(tmp_path: Path) -> None:
    display = ProgressDisplay(Console(file=io.StringIO(), force_terminal=True, width=160))
    display.on_start(info(tmp_path))
    display.on_step(record(25))
    display.on_rewind(20, REWIND)
    assert display._bar is not None
    assert display._bar.tasks[0].completed == 20
    display.on_end("finished")


def test_a_bar_does_not_go_back_with_a_late_record(tmp_path: Path) -> None:
    display = ProgressDisplay(Console(file=io.StringIO(), force_terminal=True, width=160))
    display.on_start(info(tmp_path))
    for step in (25, 26, 27):
        display.on_progress(step)
    display.on_step(record(25))
    assert display._bar is not None
    assert display._bar.tasks[0].completed == 27
    display.on_end("finished")


def test_progress_leaves_stdout_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay()
    display.on_start(info(tmp_path))
    display.on_step(record(1))
    print('{"one": "document"}')
    display.on_end("failed")
    captured = capsys.readouterr()
    assert captured.out == '{"one": "document"}\n'
    assert "run failed" in captured.err


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({}, "loss 9.75 (text 3.5) "),
        ({"balance": {"kind": "fixed"}, "targets": [{"weight": 2.5}, {}]}, "loss 9.75 (text 3.5) "),
        ({"balance": {"kind": "learned"}}, "loss text 3.5 × 2.5 "),
        ({"balance": {"kind": "gradient_norm"}}, "loss text 3.5 × 2.5 "),
        ({"targets": [{"weight": [[0, 2.5], [1, 0]]}]}, "loss text 3.5 × 2.5 "),
    ],
)
def test_weights_that_move_stand_beside_their_losses_in_place_of_the_sum_from_the_first_record_on(
    recipe: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    display = ProgressDisplay()
    display.on_start(replace(info(tmp_path), config={**CONFIG, "recipe": recipe}))
    display.on_step(record(1, {"loss": 9.75}, groups={"text": {"loss": 3.5, "weight": 2.5}}))
    assert told in capsys.readouterr().err


def test_time_left_follows_the_step_time() -> None:
    assert smooth(None, 4.0) == 4.0
    assert smooth(4.0, 2.0) == pytest.approx(3.4)
    assert "data wait 25%" in summary(record(1))
