"""Runs whose last steps have images and micro-batches of another size: on two ranks, resumed on both sides of the
border, on one rank, and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forks
from saved_runs import Done, make_calls
from shapes import metrics, write_run
from transformers import AutoImageProcessor, AutoModel

from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.config import load_run
from m3i_scale.errors import ConfigError
from m3i_scale.exports.export import export
from m3i_scale.plan.planning import machine_of
from m3i_scale.plan.search import plan_run
from m3i_scale.run.check import errors_of, resolve_run
from m3i_scale.run.resume import check_resume

pytestmark = pytest.mark.slow

BORDER, STEPS, SIZE = 3, 6, 48
PHASES = f"stages=[{{steps: {BORDER}}}, {{steps: {STEPS - BORDER}, image_size: {SIZE}, micro_batch_size: 2}}]"
STOPPED = (2, 3, 4)


def write(folder: Path, shards: Path, *overrides: str) -> Path:
    given = (
        "deepspeed=zero3_cpu_fp32",
        f"optim.steps={STEPS}",
        PHASES,
        "checkpoint.every_steps=1",
        "checkpoint.keep_latest=8",
    )
    return write_run(folder, shards, "m3i", *given, "hardware.peak_tflops=1.0", *overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Done]:
    """A run of two stages, and runs that go on from what it had saved before, at and after the border."""
    root = tmp_path_factory.mktemp("stages")
    whole = root / "whole"
    validation = (f"data.validation.val.path={shards / 'val'}", "evaluation.every_steps=2", "evaluation.batches=1")
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
    return dict(saved_weights(done.root / f"step-{STEPS:08d}", which))


def test_the_border_is_told_with_its_sizes(runs: dict[str, Done]) -> None:
    told = [(line["step"], line["image_size"], line["micro_batch_size"]) for line in lines(runs["whole"], "stage")]
    assert told == [(0, 32, 4), (BORDER, SIZE, 2)]
    small, large = (line["flop_per_step"] for line in lines(runs["whole"], "stage"))
    assert large > 2 * small
    records = metrics(runs["whole"].folder / "run.yaml")
    assert sorted(records) == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(runs["whole"], "evaluation")] == [2, 4, 6]


@pytest.mark.parametrize("step", STOPPED)
def test_a_resume_round_the_border_is_the_same_run(runs: dict[str, Done], step: int) -> None:
    whole, resumed = runs["whole"], runs[f"from {step}"]
    expected = {number: record for number, record in metrics(whole.folder / "run.yaml").items() if number > step}
    assert metrics(resumed.folder / "run.yaml") == expected
    assert [line["step"] for line in lines(resumed, "stage")] == ([BORDER] if step <= BORDER else [])
    for which in ("student", "ema"):
        there, again = weights(whole, which), weights(resumed, which)
        assert there.keys() == again.keys()
        assert all(torch.equal(there[name], again[name]) for name in there)


def test_other_ranks_and_micro_batches_are_the_same_run(
    runs: dict[str, Done], shards: Path, tmp_path: Path, forks: Forks
) -> None:
    """One rank for two, each micro-batch twice as large: as many samples are compared."""
    named = f"checkpoint.resume={runs['whole'].root / 'step-00000002'}"
    alone = write(tmp_path, shards, named, "optim.micro_batch_size=8", "stages.1.micro_batch_size=4")
    ended = forks.run("train", str(alone))
    assert ended.returncode == 0, ended.stderr
    expected, records = metrics(runs["whole"].folder / "run.yaml"), metrics(alone)
    for step in range(3, STEPS + 1):
        assert records[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4)
    there = weights(runs["whole"], "student")
    here = dict(saved_weights(tmp_path / "out" / "checkpoints" / f"step-{STEPS:08d}", "student"))
    for name, value in there.items():
        torch.testing.assert_close(here[name], value, atol=1e-4, rtol=1e-3)


def test_an_export_has_the_size_of_its_phase(runs: dict[str, Done], tmp_path: Path) -> None:
    whole = runs["whole"]
    export(whole.folder / "out", tmp_path / "last")
    model = AutoModel.from_pretrained(tmp_path / "last", add_pooling_layer=False).eval()
    assert model.config.image_size == SIZE
    processor = AutoImageProcessor.from_pretrained(tmp_path / "last")
    assert processor.crop_size["height"] == SIZE
    trained = build_backbone(backbone_config(load_run(str(whole.folder / "run.yaml")).backbone)).eval()
    assert trained.image_size == 32
    prefix = "student.model."
    values = weights(whole, "student").items()
    trained.model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in values if name.startswith(prefix)}
    )
    pixels_BCHW = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = trained.last_hidden_state(pixels_BCHW), model(pixel_values=pixels_BCHW).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)
    export(whole.root / f"step-{BORDER:08d}", tmp_path / "first")
    assert AutoModel.from_pretrained(tmp_path / "first", add_pooling_layer=False).config.image_size == 32


def test_stages_may_change_and_the_resume_reports_it(runs: dict[str, Done], shards: Path, tmp_path: Path) -> None:
    checkpoint = runs["whole"].root / f"step-{BORDER + 1:08d}"
    without = resolve_run(load_run(str(write(tmp_path / "without", shards, "stages=[]"))), 2)
    assert any(note.startswith("stages changed: ") for note in check_resume(without, checkpoint, 2))


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("stages.1.image_size=50", "stages.1"),
        ("stages.1.micro_batch_size=3", "stages.1"),
        ("stages.0.micro_batch_size=16", "stages.0"),
        ("stages.1.steps=4", "the stages have 7 steps"),
    ],
)
def test_phases_that_do_not_hold_are_refused_before_anything_starts(
    shards: Path, tmp_path: Path, override: str, place: str
) -> None:
    run_file = write(tmp_path, shards)
    assert errors_of(str(run_file), ranks=2) == []
    (fault,) = errors_of(str(run_file), [override], ranks=2)
    assert place in str(fault)


def test_a_task_has_no_phases() -> None:
    with pytest.raises(ConfigError, match="stages"):
        load_run(
            "ade20k_linear",
            ["optim.steps=2", "optim.warmup_steps=0", "stages=[{steps: 1}, {steps: 1, image_size: 448}]"],
        )


def test_every_phase_is_planned(shards: Path, tmp_path: Path) -> None:
    run = load_run(str(write(tmp_path, shards)))
    machine = machine_of("cpu", nodes=1, ranks_per_node=2, memory_gib=8.0)
    document = plan_run(run, machine, samples=None).document()
    small, large = document["stages"]
    assert (small["image_size"], large["image_size"]) == (32, SIZE)
    assert (small["micro_batch_size"], large["micro_batch_size"]) == (4, 2)
    assert large["flop_per_sample"] > 2 * small["flop_per_sample"]
    assert document["peak_gib_per_rank"] == max(small["peak_gib_per_rank"], large["peak_gib_per_rank"])
    assert document["days"] == pytest.approx(small["days"] + large["days"])
