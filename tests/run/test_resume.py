"""Two ranks under the `deepspeed` launcher: killed, asked to stop, with a damaged checkpoint or a full disk, and always
the same run in the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from disks import small_disk
from launch import TESTS, Job, start_deepspeed, start_ranks
from saved_runs import call, make_calls
from shapes import metrics, train, write_run

from m3i_scale.checkpoint.manifest import verify
from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.host.output_dir import launch_lock
from m3i_scale.host.rank_record import PHASES
from m3i_scale.run.stop import stop

STEPS = 8
WAIT_S = 900
HELD = str(TESTS / "run" / "held.py")


def steps_done(run_file: Path) -> int:
    path = run_file.parent / "out" / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def wait_for_step(job: Job, run_file: Path, step: int) -> None:
    wait_until(job, lambda: steps_done(run_file) >= step)


def wait_until(job: Job, holds: Callable[[], bool]) -> None:
    deadline, ended = time.monotonic() + WAIT_S, False
    while not holds():
        assert not ended, job.text()[-4000:]
        assert time.monotonic() < deadline, job.text()[-4000:]
        time.sleep(0.01)
        ended = job.processes[0].poll() is not None  # before it is looked at once more


def ranks_of(job: Job, workers: int) -> list[psutil.Process]:
    """The processes that train, below the launcher, once they have started their workers."""
    found = {}
    for process in psutil.Process(job.processes[0].pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            trains = {HELD, "train"} <= {*words} and "deepspeed.launcher.launch" not in words
            if trains and "RANK" in process.environ() and len(process.children()) >= workers:
                found[process] = process.ppid()
    numbers = {process.pid for process in found}
    return [process for process, parent in found.items() if parent not in numbers]


def is_gone(process: psutil.Process) -> bool:
    """Return whether a process has ended, reaped or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill(job: Job) -> None:
    """`kill -9` of the launcher and of all ranks; a rank may still be in the kernel when the signal has been sent."""
    members = []
    with contextlib.suppress(psutil.NoSuchProcess):  # the run has just finished
        members = psutil.Process(job.processes[0].pid).children(recursive=True)
    job.end()
    deadline = time.monotonic() + WAIT_S
    while not all(map(is_gone, members)):
        assert time.monotonic() < deadline, members
        time.sleep(0.01)


def checkpoints(run_file: Path) -> list[Path]:
    return sorted((run_file.parent / "out" / "checkpoints").glob("step-*"))


def fingerprint(run_file: Path) -> dict[str, str]:
    """All weights of the last step, consolidated: trained ones and the average."""
    folder = run_file.parent / "out" / "checkpoints" / f"step-{STEPS:08d}"
    return {
        f"{which}/{name}": hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for which in ("student", "ema")
        for name, value in saved_weights(folder, which).items()
    }


def same_run(run_file: Path, reference: Path) -> None:
    assert metrics(run_file) == metrics(reference)
    assert sorted(metrics(run_file)) == list(range(1, STEPS + 1))
    assert fingerprint(run_file) == fingerprint(reference)


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption, which also evaluates."""
    run_file = write_run(
        tmp_path_factory.mktemp("reference"),
        shards,
        "m3i",
        f"data.validation.val.path={shards / 'val'}",  # its label set is found by its names
        "evaluation.every_steps=4",
        "evaluation.batches=2",
        "checkpoint.keep_latest=2",
        "checkpoint.keep_best={metric: evaluation/text/loss, mode: min}",
        "checkpoint.keep_every_steps=4",
        "checkpoint.max_gib=1",
    )
    job = train(run_file, world=2, launcher=True)
    assert job.wait(WAIT_S) == [0], job.text()[-4000:]
    assert job.left_in_shared_memory == []
    return run_file


def test_the_run_trains_evaluates_and_keeps_its_newest_checkpoints(reference: Path) -> None:
    out = reference.parent / "out"
    assert [path.name for path in checkpoints(reference)] == ["step-00000004", "step-00000006", "step-00000008"]
    assert all(verify(path) == [] for path in checkpoints(reference))
    assert (out / "checkpoints" / "latest").read_text().strip() == "step-00000008"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line.get("kind") == "evaluation"]
    assert [line["step"] for line in evaluations] == [4, 8]
    assert all(
        {"loss", "text/nats", "category/loss"} <= {key.split("evaluation/")[-1] for key in line} for line in evaluations
    )


def test_the_run_tells_its_phases_and_its_share_of_the_peak(reference: Path) -> None:
    lines = [json.loads(line) for line in (reference.parent / "out" / "metrics.jsonl").read_text().splitlines()]
    start = next(line for line in lines if line["kind"] == "run")
    assert start["peak_source"] == "measured"
    assert start["device"]
    assert start["micro_batch_size"]
    for line in (line for line in lines if line["kind"] == "train"):
        sections = [line[f"time/{name}"] for name in PHASES]
        assert sum(sections) == pytest.approx(line["time/step"])
        assert min(sections) > 0
        # Captions are shorter than text.max_tokens, which the count at the start takes.
        flop = line["perf/flops_per_s"] * line["time/step"]
        assert 0 < flop <= start["flop_per_step"] * (1 + 1e-9)  # captions are padded to all that was counted
        peak = start["peak_tflops"] * 1e12 * start["world_size"]
        share = line["perf/flops_per_s"] / peak
        assert line.get("perf/mfu") == (pytest.approx(share) if share <= 1 else None)


@pytest.mark.slow
def test_killed_at_any_step_it_goes_on_as_if_nothing_had_happened(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    run_file = copy_of_run(reference, folder)
    job = train(run_file, world=2, launcher=True)
    wait_for_step(job, run_file, random.SystemRandom().randint(5, STEPS - 1))  # after the second checkpoint
    # What is written in the background is committed a step or more later.
    wait_until(job, lambda: len(checkpoints(run_file)) >= 2)
    kill(job)
    assert 2 <= len(checkpoints(run_file)) <= 4  # three, and the newest if the oldest was still to be removed

    damaged = folder.with_name("damaged")
    shutil.copytree(folder, damaged)
    newest, *older = reversed(checkpoints(damaged / "run.yaml"))
    flip_a_byte(newest)

    damaged_file = moved_run(damaged)
    again, fallback = go_on(folder, damaged)
    assert "passed over" not in again
    same_run(run_file, reference)
    assert f"passed over {newest.name}" in fallback
    assert older[0].name in fallback
    same_run(damaged_file, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "hearers"),
    [
        pytest.param(signal.SIGTERM, "one rank", marks=pytest.mark.bench),
        pytest.param(signal.SIGUSR2, "one rank", marks=pytest.mark.bench),
        (signal.SIGTERM, "all, workers too"),
        (None, "its folder"),
    ],
)
def test_asked_to_stop_it_saves_leaves_with_75_and_goes_on(
    number: int | None, hearers: str, reference: Path, tmp_path: Path
) -> None:
    run_file, go = copy_of_run(reference, tmp_path / "asked"), tmp_path / "go"
    out, told = run_file.parent / "out", []
    launched = number is None  # then the launch has the last words
    with launch_lock(out) if launched else contextlib.nullcontext():
        workers = 2 if hearers == "all, workers too" else 0
        arguments = [HELD, str(go), "train", str(run_file), f"data.num_workers={workers}"]
        job = start_deepspeed(arguments, 2, run_file.parent / "logs")
        wait_until(job, (out / "run.yaml").exists)  # the ranks have met
        wait_until(job, lambda: len(ranks_of(job, workers)) == 2)
        ranks = ranks_of(job, workers)
        members = [child for rank in ranks for child in (*rank.children(), rank)]
        wait_for_step(job, run_file, 1)  # at any later step, but for the last ones, which wait for `go`
        if number is None:
            result = stop(str(out), [], wait=True, tell=lambda text: (told.append(text), go.touch()))
            assert (result["status"], len(told)) == ("stopped", 1)
            assert Path(result["checkpoint"]) == checkpoints(run_file)[-1]
        elif hearers == "one rank":
            ranks[-1].send_signal(number)
        else:
            for process in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        go.touch()
        assert job.wait(WAIT_S) == [75], job.text()[-4000:]
    newest = checkpoints(run_file)[-1]
    step = int(newest.name.removeprefix("step-"))
    assert 1 <= step < STEPS
    assert verify(newest) == []
    assert steps_done(run_file) == step
    assert "Traceback" not in job.text()
    told_by_rank = job.text().count(f"stopped at step {step}, saved in {newest}; rerun the same command")
    assert told_by_rank == (0 if launched else 1), job.text()[-4000:]
    assert stop(str(run_file), [], wait=True, tell=told.append)["status"] == "idle"
    go_on(run_file.parent)
    same_run(run_file, reference)


# ---------------------------------------------------------------- a full disk


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root, which the pipeline has")
def test_a_full_disk_ends_the_run_and_not_its_last_checkpoint(shards: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 12) as disk:
        run_file = write_run(disk, shards, "m3i")
        arguments = ["-m", "m3i_scale", "train", str(run_file), "checkpoint.keep_latest=8"]
        job = start_ranks(arguments, 1, tmp_path / "logs")  # what it says needs room, too
        codes = job.wait(WAIT_S)
        assert codes == [2], job.text()[-4000:]
        assert "Traceback" not in job.text()
        assert "space" in job.text()
        left = checkpoints(run_file)
        assert left
        assert all(verify(path) == [] for path in left)
        assert dict(saved_weights(left[-1], "ema"))


# ---------------------------------------------------------------- helpers


def go_on(*folders: Path) -> list[str]:
    """Call the command again, on two ranks without a launcher; return what the first rank of each run says."""
    runs = {folder.name: folder for folder in folders}
    calls = {name: call(folder, faults=[]) for name, folder in runs.items()}
    done = make_calls(calls, runs, folders[0].with_name("results"))
    assert [told.codes for told in done.values()] == [[0, 0]] * len(folders), done
    return [told.texts[0] for told in done.values()]


def copy_of_run(reference: Path, folder: Path) -> Path:
    """The same run file with an output of its own; without the evaluation and what it decides."""
    folder.mkdir(parents=True)
    values = yaml.safe_load(reference.read_text())
    values["output_dir"] = str(folder / "out")
    values["data"]["validation"] = {}
    values["evaluation"]["every_steps"] = 0
    values["checkpoint"] |= {"keep_latest": 3, "keep_every_steps": None, "keep_best": None, "max_gib": None}
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(values))
    return run_file


def moved_run(folder: Path) -> Path:
    """After a run was copied to another folder."""
    run_file = folder / "run.yaml"
    text = run_file.read_text()
    run_file.write_text(text.replace(str(folder.with_name("killed") / "out"), str(folder / "out")))
    return run_file


def flip_a_byte(checkpoint: Path) -> None:
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content: Any = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


@pytest.mark.slow
def test_a_recipe_with_schedules_resumes_and_may_be_made_longer(shards: Path, tmp_path: Path) -> None:
    """The loss of the stored samples follows schedules of temperature, which were at 3/4 when it was saved."""
    run_file = write_run(tmp_path, shards, "dinov2")
    for steps in (4, 6):
        job = train(run_file, f"optim.steps={steps}", logs=f"logs-{steps}")
        assert job.wait() == [0], job.text()[-4000:]
    assert "step-00000006" in {checkpoint.name for checkpoint in checkpoints(run_file)}
