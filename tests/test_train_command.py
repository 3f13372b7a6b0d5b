"""`train` starts one process per GPU, and prints what it does at its start and its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import TESTS, environment
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.config import load_run
from m3i_scale.errors import UserError
from m3i_scale.launch.local import count_processes
from m3i_scale.rank_variables import limit_threads, under_launcher, without_thread_limits
from m3i_scale.run.summary import finished_text

sys.path.insert(0, str(TESTS / "run"))
from shapes import make_shapes, write_run

ON_TWO = """
import m3i_scale.launch.job as job, m3i_scale.__main__ as door
job.gpus_here = lambda: 2
door.run()
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.mark.parametrize(
    ("gpus", "visible", "processes"),
    [(None, 0, 1), (None, 1, 1), (None, 8, 8), (2, 8, 2), (1, 8, 1)],
)
def test_one_process_per_gpu(gpus: int | None, visible: int, processes: int) -> None:
    assert count_processes(gpus, visible, launched=False) == processes
    assert count_processes(None, visible, launched=True) == 1


@pytest.mark.parametrize(
    ("gpus", "visible", "launched", "fix"),
    [(3, 2, False, "--gpus 2"), (2, 0, False, "--ranks-per-node 2"), (1, 4, True, "leave it out")],
)
def test_gpus_that_cannot_be_used_are_an_error_with_a_fix(gpus: int, visible: int, launched: bool, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        count_processes(gpus, visible, launched=launched)
    assert caught.value.where == f"--gpus {gpus}"
    assert fix in str(caught.value.fix)


@pytest.mark.parametrize(
    ("variables", "launched"),
    [
        ({}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),  # a batch script has them outside srun, too
        ({"RANK": "0"}, True),
        ({"WORLD_SIZE": "2"}, True),
        ({f"OMPI_COMM_WORLD_{name}": "1" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")}, True),
    ],
)
def test_ranks_of_a_launcher_are_recognized(variables: dict[str, str], launched: bool) -> None:
    assert under_launcher(variables) == launched


def test_started_processes_share_the_cores_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would inherit the number of threads of a single process, each."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("m3i_scale.rank_variables._set_here", set())
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    limit_threads(os.environ, 1)
    passed_on = without_thread_limits(os.environ)
    assert "OMP_NUM_THREADS" in os.environ
    assert "OMP_NUM_THREADS" not in passed_on
    assert passed_on["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_NUM_THREADS")


def test_a_batch_that_the_gpus_do_not_divide_is_an_error_before_any_process_starts(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m3i_scale.launch.job.gpus_here", lambda: 4)
    error = CliRunner().invoke(app, ["train", str(write_run(tmp_path, shards, "mae")), "optim.batch_size=24"]).exception
    assert isinstance(error, UserError)
    assert error.where == "optim.batch_size: 24, on 4 ranks"
    assert "optim.batch_size to 16 or 32" in str(error.fix)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_has_nothing_to_export(tmp_path: Path) -> None:
    run = load_run("m3i", [f"output_dir={tmp_path}"])
    assert "export" not in finished_text(run, 5)
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    assert "m3i-scale export" in finished_text(run, 5)


def test_two_processes_train_as_one_command(shards: Path, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, shards, "mae", "optim.steps=3", "log.progress=true")
    command = [sys.executable, "-c", ON_TWO, "train", str(run_file)]
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stderr.splitlines()
    assert not any("RANK=" in line or "Setting accelerator" in line for line in lines)
    starts = [number for number, line in enumerate(lines) if line.startswith("run ")]
    assert len(starts) == 1, lines  # of rank 0 alone
    assert any("8 = 4 per device × 1 accumulation × 2 devices" in line for line in lines)
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps][-1] == "3/3"
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000003"
    assert any(line.startswith("finished: 3 steps") and str(checkpoint) in line for line in lines)
    assert lines[-1].startswith(f"next: m3i-scale export {tmp_path / 'out'} ")
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["world_size"] == 2
    resumed = CliRunner().invoke(app, ["check", str(run_file), "optim.steps=4", "--ranks", "2"])
    assert resumed.exit_code == 0
    assert "resumes from step 3" in resumed.stdout
