"""Two ranks whose loss spikes: they go back and go on behind the data; killed then, the run is the same in the end."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from launch import TESTS, Job, start_ranks
from shapes import metrics, write_run

from m3i_scale.checkpoint_tools.consolidate import saved_weights

pytestmark = pytest.mark.slow

WAIT_S = 600
STEPS, BATCH = 12, 8
EARLY, SPIKE, NAN, AGAIN = [5, 6, 1e3], [9, 10, 1e3], [12, 12, "nan"], [14, 15, 1e3]
KILL = [12, 12, "kill"]
"""Global batches and factors. Before the first checkpoint, of step 4; confirmed at step 10, which goes back to 4, since
that of step 8 gave the first loss of the spike; in step 6 of the second time; in steps 8 and 9 of the second time."""
FOLDERS = ("checkpoints", "pictures")
OVERRIDES = (
    f"optim.steps={STEPS}",
    "checkpoint.every_steps=4",
    "checkpoint.keep_latest=2",
    "guard.spike={z: 100, window: 8, min_history: 4, patience: 2, max_rewinds: 1}",
    "deepspeed=zero3_cpu_fp32",
    "log.pictures_every_steps=8",
    "log.picture_samples=4",
)


def start(run_file: Path, *faults: list[Any], logs: str = "logs") -> Job:
    path = run_file.parent / f"{logs}.json"
    path.write_text(json.dumps(faults))
    return start_ranks(
        [str(TESTS / "run" / "spiking.py"), str(path), "train", str(run_file)], 2, run_file.parent / logs
    )


def lines(run_file: Path) -> list[dict[str, Any]]:
    path = run_file.parent / "out" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weights(run_file: Path) -> dict[str, str]:
    folder = run_file.parent / "out" / "checkpoints" / f"step-{STEPS:08d}"
    return {
        f"{which}/{name}": hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for which in ("student", "ema")
        for name, value in saved_weights(folder, which).items()
    }


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`whole` was not killed; `resumed` was, after it went back; `ended` too, and met a spike too many."""
    root = tmp_path_factory.mktemp("rewind")
    whole = write_run(root / "whole", shards, "m3i", *OVERRIDES)
    killed = write_run(root / "killed", shards, "m3i", *OVERRIDES)
    jobs = [start(whole, EARLY, SPIKE, NAN), start(killed, EARLY, SPIKE, KILL)]
    assert -signal.SIGKILL in jobs[1].wait(WAIT_S), jobs[1].text()[-4000:]
    assert [line["step"] for line in lines(killed) if line["kind"] == "rewind"] == [4]
    left = {name: sorted(path.name for path in (killed.parent / "out" / name).glob("step-*")) for name in FOLDERS}
    assert left == {"checkpoints": ["step-00000004"], "pictures": ["step-00000000"]}  # those of step 8 are undone
    found = {"whole": whole}
    codes = {}
    for name, faults in (("resumed", [EARLY, SPIKE, NAN]), ("ended", [EARLY, SPIKE, AGAIN])):
        copy = root / name
        shutil.copytree(killed.parent, copy)
        found[name] = copy / "run.yaml"
        found[name].write_text(found[name].read_text().replace(str(killed.parent), str(copy)))
        job = start(found[name], *faults, logs="again")
        codes[name] = job.wait(WAIT_S)
        assert codes[name] == ([2, 2] if name == "ended" else [0, 0]), job.text()[-4000:]
    assert jobs[0].wait(WAIT_S) == [0, 0], jobs[0].text()[-4000:]
    return found


def test_a_spike_is_told_where_there_is_no_checkpoint_and_goes_back_where_there_is(runs: dict[str, Path]) -> None:
    told = lines(runs["whole"])
    rewinds = [line for line in told if line["kind"] == "rewind"]
    assert len(rewinds) == 1
    wanted = {
        "rewound_from": 10,
        "rewound_to": 4,
        "skipped_samples": 6 * BATCH,
        "spike_since": 9,
        "number": 1,
        "most": 1,
    }
    assert {key: rewinds[0][key] for key in wanted} == wanted
    assert rewinds[0]["loss"] > rewinds[0]["limit"]
    undone = (runs["whole"].parent / "out" / "metrics.replaced.jsonl").read_text().splitlines()
    early = [json.loads(line) for line in undone if json.loads(line)["kind"] == "warning"]
    assert [(line["step"], line["group"]) for line in early if line["group"] == "guard"] == [(6, "guard")]
    assert "no checkpoint to go back to" in early[0]["what"]
    steps = [line["step"] for line in told if line["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))  # no step twice
    assert sorted(json.loads(line)["step"] for line in undone if json.loads(line)["kind"] == "train") == list(
        range(5, 11)
    )
    warnings = [line["what"] for line in told if line["kind"] == "warning" and line["group"] == "guard"]
    assert ["gone back" in what for what in warnings] == [True, False]
    assert "the loss is not finite, the step is left out" in warnings[1]


def test_a_loss_that_is_not_finite_is_counted_and_left_out_of_the_means(runs: dict[str, Path]) -> None:
    counts = {step: figures["skipped_nonfinite"] for step, figures in metrics(runs["whole"]).items()}
    assert counts == {step: int(step >= 6) for step in range(1, STEPS + 1)}
    assert metrics(runs["whole"])[6]["loss"] == "nan"
    assert "grad_norm" not in metrics(runs["whole"])[6]


def test_killed_after_a_rewind_it_goes_on_as_if_nothing_had_happened(runs: dict[str, Path]) -> None:
    # Shares since the last record are those of a process.
    figures = [
        {step: {k: v for k, v in told.items() if "recent" not in k} for step, told in metrics(runs[name]).items()}
        for name in ("whole", "resumed")
    ]
    assert figures[0] == figures[1]
    assert weights(runs["whole"]) == weights(runs["resumed"])
    states = [
        {
            path.name: path.read_text()
            for path in (runs[name].parent / "out").glob(f"checkpoints/step-{STEPS:08d}/data/*")
        }
        for name in ("whole", "resumed")
    ]
    assert states[0]
    assert states[0] == states[1]


def test_rewinds_are_counted_across_restarts_and_one_too_many_ends_the_run(runs: dict[str, Path]) -> None:
    text = (runs["ended"].parent / "again" / "process-0.log").read_text()
    assert "another loss spike after max_rewinds" in text
    assert "Traceback" not in text
