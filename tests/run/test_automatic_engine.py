"""Runs with `deepspeed: auto`: the first start chooses, and every resume keeps the choice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from launch import Job, environment, free_port
from shapes import metrics, train, write_run
from typer.testing import CliRunner

from m3i_scale.cli import app

pytestmark = pytest.mark.slow

WAIT_S = 600


def chosen(run_file: Path) -> str:
    return yaml.safe_load((run_file.parent / "out" / "run.yaml").read_text())["deepspeed"]


def test_a_resume_on_other_ranks_keeps_the_choice(shards: Path, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, shards, "m3i", "deepspeed=auto", "optim.steps=4", "optim.warmup_steps=1")
    checked = CliRunner().invoke(app, ["check", str(run_file), "--ranks", "2"])
    job = train(run_file, world=2)
    assert job.wait(WAIT_S) == [0, 0], job.text()[-4000:]
    (line,) = (line for line in job.text().splitlines() if line.startswith("deepspeed "))
    assert "auto: zero1_cpu_fp32" in line
    assert "2 ranks" in line
    assert "auto: zero1_cpu_fp32" in checked.stdout
    assert "2 ranks" in checked.stdout
    assert chosen(run_file) == "zero1_cpu_fp32"

    job = train(run_file, "deepspeed=zero3_cpu_fp32", "optim.steps=6", logs="explicit")  # set by the user
    assert job.wait(WAIT_S) == [0], job.text()[-4000:]
    assert "auto:" not in job.text()
    job = train(run_file, "optim.steps=8", logs="resumed")
    assert job.wait(WAIT_S) == [0], job.text()[-4000:]
    assert "auto: zero3_cpu_fp32" in job.text()
    assert "step-00000006" in job.text()
    assert chosen(run_file) == "zero3_cpu_fp32"
    assert sorted(metrics(run_file)) == [*range(1, 9)]


def test_ranks_with_less_memory_follow_rank_0(shards: Path, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, shards, "mae", "deepspeed=auto", "optim.steps=2", "optim.warmup_steps=1")
    port = free_port()
    # Processes share the memory of a machine: rank 1 believes that it has almost none.
    environments = [
        environment(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE=ranks_here,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank, ranks_here in enumerate(("2", "10000000"))
    ]
    job = Job([[sys.executable, "-m", "m3i_scale", "train", str(run_file)]] * 2, environments, tmp_path / "logs", port)
    assert job.wait(WAIT_S) == [0, 0], job.text()[-4000:]
    assert chosen(run_file) == "zero1_cpu_fp32"
