"""What `m3i-scale launch --with slurm` writes, submitted to a real Slurm: two nodes with a rank each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from launch import environment, free_port
from shapes import make_shapes, metrics, train, write_run
from slurm import Slurm, missing, slurm, sweep

from m3i_scale.launch.description import read_cluster
from m3i_scale.launch.execute import write_files
from m3i_scale.launch_command import read_job, render

STEPS = 16
WAIT_S = 900
TRAVELS = ("DS_ACCELERATOR", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH", "TORCH_EXTENSIONS_DIR")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as running:
        yield running


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption, and without Slurm."""
    folder = tmp_path_factory.mktemp("reference")
    run_file = write_run(folder, make_shapes(folder / "shapes"), "m3i", f"optim.steps={STEPS}")
    job = train(run_file, world=2)
    assert job.wait(WAIT_S) == [0, 0], job.text()[-4000:]
    return run_file


class Submitted:
    """A run as a job of Slurm."""

    def __init__(self, cluster: Slurm, run_file: Path, *overrides: str, **options: Any) -> None:
        """As `m3i-scale launch` does it, in this process."""
        self.cluster, self.folder = cluster, run_file.parent / "out"
        travels = [name for name in TRAVELS if name in cluster.environment]
        given = {
            "nodes": 2,
            "ranks_per_node": 1,
            "gpus_per_node": 0,
            "time_limit": "00:10:00",
            "master_port": free_port(),
            "workdir": str(run_file.parent),
            "environment": [f"{name}={cluster.environment[name]}" for name in travels],
        }
        plan = render("slurm", read_job(str(run_file), list(overrides), read_cluster(None, given | options))[1])
        write_files(plan)
        self.number = cluster.command(*plan.commands[0].argv).split()[-1]  # Submitted batch job 7

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    @property
    def starts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"]) + 1

    def log(self) -> str:
        path = self.folder / "launch" / f"slurm-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def steps(self) -> list[int]:
        """Those that were taken, in order."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line["step"] for line in lines if line["kind"] == "train"]

    def ranks(self) -> list[psutil.Process]:
        found = []
        for process in self.cluster.processes("m3i_scale", "train", str(self.folder.parent / "run.yaml")):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                found += [process] if "RANK" in process.environ() else []
        return found

    def wait_for_step(self, step: int) -> None:
        def there() -> bool:
            assert self.state not in ("COMPLETED", "FAILED"), self.told()
            return len(self.steps()) >= step

        self.cluster.wait(there, self.told, WAIT_S)

    def wait_for_state(self, *states: str) -> None:
        self.cluster.wait(lambda: self.state in states, self.told, WAIT_S)

    def wait_for_start(self, number: int) -> None:
        self.cluster.wait(lambda: self.starts == number and self.state == "RUNNING", self.told, WAIT_S)

    def told(self) -> str:
        return f"{self.cluster.job(self.number)}\n{self.log()[-6000:]}"


@contextlib.contextmanager
def paused(ranks: list[psutil.Process]) -> Iterator[None]:
    for rank in ranks:
        rank.suspend()
    yield
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.resume()


def signaled(process: psutil.Process, number: int) -> bool:
    """Whether the signal waits for a process, or has ended it: Slurm also lets it go on."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd"))
    return bool(mask >> (number - 1) & 1)


def copy_of(reference: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    values = yaml.safe_load(reference.read_text()) | {"output_dir": str(folder / "out")}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def failure(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out" / "failure.json").read_text())
    return dict(content["cause"])


def test_near_its_limit_requeued_by_hand_and_off_a_lost_node_it_stays_one_run(
    cluster: Slurm, reference: Path, tmp_path: Path
) -> None:
    job = Submitted(cluster, copy_of(reference, tmp_path / "run"))
    cluster.wait(lambda: len(job.ranks()) == 2, job.told, WAIT_S)
    ranks = job.ranks()
    job.wait_for_step(1)
    with paused(ranks):  # it would be done before Slurm looks at limits, which it does twice a minute
        cluster.command("scontrol", "update", f"jobid={job.number}", "timelimit=2")
        cluster.wait(lambda: all(signaled(rank, signal.SIGUSR2) for rank in ranks), job.told, WAIT_S)
    job.wait_for_state("PENDING")
    assert job.log().count("Exited with exit code 75") == 2
    assert "after saving a checkpoint: requeuing it" in job.log()
    done = len(job.steps())
    assert 1 <= done < STEPS - 4
    cluster.command("scontrol", "update", f"jobid={job.number}", "timelimit=10")

    job.wait_for_start(2)
    job.wait_for_step(done + 1)
    cluster.command("scontrol", "requeue", job.number)
    job.wait_for_state("PENDING")
    done = len(job.steps())

    job.wait_for_start(3)
    job.wait_for_step(done + 1)
    cluster.command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    job.wait_for_state("PENDING")
    done = len(job.steps())
    assert done < STEPS
    cluster.command("scontrol", "update", "nodename=n2", "state=resume")

    job.wait_for_state("COMPLETED")
    assert job.starts == 4
    assert job.steps() == list(range(1, STEPS + 1))  # none lost, none repeated
    assert metrics(tmp_path / "run" / "run.yaml") == metrics(reference)
    assert "Traceback" not in job.log()


def test_a_rank_that_dies_ends_the_job_everywhere(cluster: Slurm, reference: Path, tmp_path: Path) -> None:
    job = Submitted(cluster, copy_of(reference, tmp_path / "run"), "optim.steps=1000")
    job.wait_for_step(1)
    next(rank for rank in job.ranks() if rank.environ()["RANK"] == "1").kill()
    job.wait_for_state("FAILED")
    assert cluster.job(job.number)["ExitCode"] == f"{128 + signal.SIGKILL}:0"
    assert not job.ranks()
    assert job.starts == 1
    cause = failure(tmp_path / "run")
    assert (cause["rank"], cause["kind"]) == (1, "silent")
    assert cause["step"] >= 1
    assert job.log().count("root cause: the rank ended without an error report") == 1


def test_a_mistake_is_told_and_not_repeated(cluster: Slurm, reference: Path, tmp_path: Path) -> None:
    job = Submitted(cluster, copy_of(reference, tmp_path / "run"), "data.datasets.shapes.path=/nowhere")
    job.wait_for_state("FAILED")
    assert cluster.job(job.number)["ExitCode"] == "2:0"
    assert "/nowhere" in job.log()
    assert job.starts == 1
    assert failure(tmp_path / "run")["kind"] == "user_error"
    assert job.log().count("root cause: ") == 1


ELASTIC = """\
#!/bin/bash
set -e
python=({python} -u -m m3i_scale)
"${{python[@]}}" doctor --transport srun --interface lo --master-port {port} {travels} --json > {folder}/doctor.json
exec "${{python[@]}}" launch {folder}/run.yaml --with elastic --transport srun --max-restarts 1 {travels}
"""


def test_elastic_and_the_doctor_reach_the_hosts_of_their_allocation_with_srun(
    cluster: Slurm, reference: Path, tmp_path: Path
) -> None:
    run_file = copy_of(reference, tmp_path / "run")
    travels = " ".join(f"--env {name}" for name in TRAVELS if name in cluster.environment)
    script = run_file.parent / "job.sh"
    words = {"python": sys.executable, "folder": run_file.parent, "travels": travels, "port": free_port()}
    script.write_text(ELASTIC.format(**words))
    number = cluster.submit(script, "--nodes=2", "--ntasks-per-node=1", f"--output={script.parent}/log")
    log = script.parent / "log"

    def state() -> str:
        return cluster.job(number)["JobState"]

    def ranks() -> dict[str, psutil.Process]:
        found = {}
        for process in cluster.processes("m3i_scale", "train", str(run_file)):
            with contextlib.suppress(psutil.Error, KeyError):  # it has ended meanwhile, or is no rank
                found[process.environ()["RANK"]] = process
        return found

    def trains() -> bool:
        assert state() not in ("COMPLETED", "FAILED"), log.read_text()[-6000:]
        return (run_file.parent / "out" / "metrics.jsonl").exists() and len(ranks()) == 2

    cluster.wait(trains, lambda: log.read_text()[-6000:], WAIT_S)
    ranks()["1"].kill()
    cluster.wait(lambda: state() in ("COMPLETED", "FAILED"), lambda: log.read_text()[-6000:], WAIT_S)
    assert state() == "COMPLETED", log.read_text()[-6000:]
    attempts = json.loads((run_file.parent / "out" / "attempts.json").read_text())
    assert [attempt["hosts"] for attempt in attempts] == [["n1", "n2"]] * 2
    assert (attempts[0]["cause"]["rank"], attempts[0]["cause"]["host"]) == (1, "n2")
    assert metrics(run_file) == metrics(reference)
    findings = json.loads((script.parent / "doctor.json").read_text())
    assert [item["host"] for item in findings if item["check"] == "ssh" and item["ok"]] == ["n1", "n2"]
    assert [item["ok"] for item in findings if item["check"] == "group"] == [True]


# ---------------------------------------------------------------- ranks that are no ranks, for the script alone

RANKS = """\
#!/bin/bash
# Leaves a second after the rank before it when asked to, as ranks with much to close do.
trap 'sleep "$RANK"; exit 75' USR2 TERM
echo "rank $RANK of $WORLD_SIZE, here $LOCAL_RANK of $LOCAL_WORLD_SIZE, at $MASTER_ADDR, restart $SLURM_RESTART_COUNT"
while :; do sleep 0.1; done
"""


def program(folder: Path, text: str) -> dict[str, str]:
    """A script in the interpreter's place."""
    path = folder / "program"
    path.write_text(text)
    path.chmod(0o755)
    return {"python": str(path)}


def test_signalled_it_goes_back_into_the_queue_and_cancelled_it_does_not(
    cluster: Slurm, reference: Path, tmp_path: Path
) -> None:
    job = Submitted(cluster, copy_of(reference, tmp_path / "run"), **program(tmp_path, RANKS))

    def all_say(start: int) -> None:
        lines = {f"rank {rank} of 2, here 0 of 1, at n1, restart {start or ''}" for rank in range(2)}
        cluster.wait(lambda: lines <= set(job.log().splitlines()), job.told)

    all_say(0)
    cluster.command("scancel", "--signal=USR2", job.number)
    all_say(1)
    assert job.starts == 2
    cluster.command("scancel", job.number)
    job.wait_for_state("CANCELLED")
    assert job.starts == 2


# ---------------------------------------------------------------- the cluster itself

HOLD = "import time; from slurm import slurm\nwith slurm() as held: print(held.folder, flush=True); time.sleep(600)"


def test_a_killed_test_leaves_no_process_and_its_folder_goes_with_the_next() -> None:
    variables = environment()
    variables["PYTHONPATH"] += os.pathsep + os.path.dirname(__file__)
    holder = subprocess.Popen([sys.executable, "-c", HOLD], env=variables, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    folder = Path(holder.stdout.readline().strip())
    names: dict[psutil.Process, str] = {}
    for process in psutil.Process(holder.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            names[process] = process.name()
    assert list(names.values()).count("slurmd") == 2
    inside = [process for process, name in names.items() if name in ("munged", "slurmctld", "slurmd")]
    holder.kill()
    holder.communicate()
    _, alive = psutil.wait_procs(inside, timeout=300)
    assert alive == []
    assert folder.is_dir()
    sweep()
    assert not folder.exists()
