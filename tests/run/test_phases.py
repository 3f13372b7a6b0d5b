"""Runs whose last steps have images and micro-batches of another size: on two ranks, resumed on both sides of the
border, on one rank, and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import Done, make_calls
from shapes import metrics, write_run

from m3i_scale.scale.checkpoint.weights import load_weights

BORDER, STEPS, SIZE = 3, 6, 48
PHASES = f"phases=[{{steps: {BORDER}}}, {{steps: {STEPS - BORDER}, image_size: {SIZE}, micro_batch_size: 2}}]"
STOPPED = (2, 3, 4)


def write(folder: Path, shards: Path, *overrides: str) -> Path:
    given = (f"optim.steps={STEPS}", PHASES, "checkpoint.every_steps=1", "checkpoint.keep_latest=8")
    return write_run(folder, shards, "m3i", *given, "hardware.peak_tflops=1.0", *overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Done]:
    """A run of two phases, and runs that go on from what it had saved before, at and after the border."""
    root = tmp_path_factory.mktemp("phases")
    whole = root / "whole"
    validation = (f"data.validation.val.shards={shards / 'val'}", "evaluation.every_steps=2", "evaluation.batches=1")
    write(whole, shards, *validation)
    started = make_calls(
        {"whole": {"arguments": ["train", str(whole / "run.yaml")], "faults": []}}, {"whole": whole}, root / "started"
    )
    calls, folders = {}, {}
    for step in STOPPED:
        folder = folders[f"from {step}"] = root / f"from-{step}"
        write(folder, shards, *validation)
        named = f"checkpoint.resume={whole / 'out' / 'checkpoints' / f'step-{step:08d}'}"
        calls[f"from {step}"] = {"arguments": ["train", str(folder / "run.yaml"), named], "faults": []}
    done = started | make_calls(calls, folders, root / "resumed")
    for name, one in done.items():
        assert one.codes == [0, 0], (name, one.texts)
    return done


def lines(done: Done, kind: str) -> list[dict[str, Any]]:
    written = (done.folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, written) if line["kind"] == kind]


def weights(done: Done, which: str) -> dict[str, torch.Tensor]:
    return load_weights(done.root / f"step-{STEPS:08d}", which)


def test_the_border_is_told_with_its_sizes(runs: dict[str, Done]) -> None:
    told = [(line["step"], line["image_size"], line["micro_batch_size"]) for line in lines(runs["whole"], "phase")]
    assert told == [(0, 32, 4), (BORDER, SIZE, 2)]
    small, large = (line["flop_per_step"] for line in lines(runs["whole"], "phase"))
    assert large > 2 * small
    records = metrics(runs["whole"].folder / "run.yaml")
    assert sorted(records) == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(runs["whole"], "evaluation")] == [2, 4, 6]


@pytest.mark.parametrize("step", STOPPED)
def test_a_resume_round_the_border_is_the_same_run(runs: dict[str, Done], step: int) -> None:
    whole, resumed = runs["whole"], runs[f"from {step}"]
    expected = {number: record for number, record in metrics(whole.folder / "run.yaml").items() if number > step}
    assert metrics(resumed.folder / "run.yaml") == expected
    assert [line["step"] for line in lines(resumed, "phase")] == ([BORDER] if step <= BORDER else [])
    for which in ("student", "momentum"):
        there, again = weights(whole, which), weights(resumed, which)
        assert there.keys() == again.keys()
        assert all(torch.equal(there[name], again[name]) for name in there)
