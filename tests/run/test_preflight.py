"""What a run needs of its hosts, and a run on machines that have less."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from launch import ROOT, start_ranks
from shapes import write_run
from tiny import tiny_overrides

from m3i_scale.config import CheckpointConfig, DatasetConfig, KeepBestConfig, load_run
from m3i_scale.objective.build import build_objective
from m3i_scale.run.preflight import needs_of, retained_checkpoints

LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv[1:] = sys.argv[2:]
runpy.run_module("m3i_scale", run_name="__main__", alter_sys=True)
"""

OTHER = """
import os, runpy, sys
if os.environ["RANK"] == "1":
    sys.path.insert(0, sys.argv[1])
    sys.argv.append("seed=7")
sys.argv[1:] = sys.argv[2:]
runpy.run_module("m3i_scale", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("recipe", ["m3i", "mae"])
def test_the_size_of_a_checkpoint_is_that_of_the_modules(recipe: str):
    sizes = ["optim.batch_size=16", "optim.micro_batch_size=4"]
    run = load_run(recipe, [*tiny_overrides(recipe), *sizes, "deepspeed=zero3_bf16"])
    labels = {"shapes": ["a", "b"]}
    needs = needs_of(run, labels, 64, world_size=2, ranks_here=1)
    objective = build_objective(run, labels, 64)
    averaged = sum(value.numel() for name, value in objective.named_parameters() if name.startswith("momentum."))
    trained = sum(value.numel() for value in objective.parameters() if value.requires_grad)
    frozen = sum(value.numel() for value in objective.parameters() if not value.requires_grad) - averaged
    kept = objective.state_dict().keys()
    remembered = sum(value.nbytes for name, value in objective.named_buffers() if name in kept)
    assert needs.checkpoint_bytes == 12 * trained + 4 * averaged + 2 * frozen + remembered  # frozen: bf16
    assert (averaged > 0) == (recipe == "m3i")
    # This host holds half of the states, and as much again while a checkpoint is written in the background.
    assert needs.state_bytes == needs.memory_bytes == needs.checkpoint_bytes // 2
    assert needs.shm_bytes == 0  # no loader processes


def test_loader_processes_and_ranks_ask_for_shared_memory_and_files():
    run = load_run("mae", [*tiny_overrides("mae"), "optim.batch_size=16", "optim.micro_batch_size=4"])
    with_workers = run.model_copy(update={"data": run.data.model_copy(update={"num_workers": 2})})
    few, many = (
        needs_of(run, {}, 0, world_size=2, ranks_here=2),
        needs_of(with_workers, {}, 0, world_size=4, ranks_here=4),
    )
    pixels = 3 * 32 * 32 * 4
    assert many.shm_bytes == 4 * 2 * pixels
    assert many.open_files > few.open_files > 100
    validation = {"photos": DatasetConfig(path="/data/validation")}
    validates = with_workers.model_copy(
        update={"data": with_workers.data.model_copy(update={"validation": validation})}
    )
    both = needs_of(validates, {}, 0, world_size=4, ranks_here=4)  # two sets of workers stand at the same time
    assert both.shm_bytes == 2 * many.shm_bytes
    assert both.open_files > many.open_files


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (CheckpointConfig(every_steps=10, keep_latest=2), 3),
        (CheckpointConfig(every_steps=60, keep_latest=5), 2),  # the run saves no more than that
        (CheckpointConfig(every_steps=10, keep_latest=2, keep_every_steps=20), 8),
        (CheckpointConfig(every_steps=10, keep_latest=2, keep_best=KeepBestConfig(metric="evaluation/loss")), 4),
    ],
)
def test_how_many_checkpoints_lie_there_at_a_time(config: CheckpointConfig, kept: int):
    assert retained_checkpoints(config, steps=100) == kept


def test_a_limit_in_gib_bounds_what_is_kept():
    run = load_run("mae", [*tiny_overrides("mae"), "optim.batch_size=16", "optim.micro_batch_size=4"])
    limited = run.model_copy(update={"checkpoint": CheckpointConfig(every_steps=1, keep_latest=1, max_gib=1e-6)})
    needs = needs_of(limited, {}, 0, world_size=1, ranks_here=1)
    assert needs.kept_bytes == 2 * needs.checkpoint_bytes  # the last good one, and the one being written


def test_a_run_that_may_not_open_enough_files_ends_on_all_ranks_with_all_faults(shards: Path, tmp_path: Path):
    run_file = write_run(tmp_path, shards, "mae")
    (tmp_path / "limited.py").write_text(LIMITED)
    job = start_ranks([str(tmp_path / "limited.py"), "160", "train", str(run_file)], 2, tmp_path / "logs")
    assert job.wait() == [2, 2], job.text()[-4000:]
    for number in range(2):
        text = job.log(number).read_text()
        assert "files: ulimit -n 160 (hard 160)" in text
        assert "a rank opens about 168" in text
        assert "Traceback" not in text
    assert not list((tmp_path / "out").glob("run.yaml"))  # nothing has begun


def test_ranks_with_other_code_or_another_run_file_are_refused_with_what_differs(shards: Path, tmp_path: Path):
    for name in ("m3i_scale", "recipes", "protocols", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / "other" / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / "m3i_scale" / "objective" / "targets.py").open("a") as file:
        file.write("# another commit\n")
    run_file = write_run(tmp_path, shards, "mae")
    (tmp_path / "other.py").write_text(OTHER)
    job = start_ranks(
        [str(tmp_path / "other.py"), str(tmp_path / "other"), "train", str(run_file)], 2, tmp_path / "logs"
    )
    assert job.wait() == [2, 2], job.text()[-4000:]
    told = job.log(0).read_text()
    assert f"{socket.gethostname()}, rank 1" in told
    assert "ranks would differ: m3i_scale/objective/targets.py; the master node has" in told
    assert "run.seed: 7, not 0" in told
    assert "Traceback" not in job.text()
    assert not (run_file.parent / "out" / "checkpoints").exists()
