"""A run on four hosts: a rank is killed, a host loses its power and comes back, and it is the same run."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import Hosts, Process, unavailable
from launch import environment
from shapes import make_shapes, metrics, train, write_run
from test_failing_hosts import until

pytestmark = pytest.mark.slow

STEPS = 70
EXTENSIONS = "/dev/shm/torch_extensions"
TRAVELS = ("PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE")


@pytest.fixture(scope="module")
def four() -> Iterator[Hosts]:
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    with Hosts(4) as hosts:
        yield hosts


def elastic_run(folder: Path, shards: Path) -> Path:
    return write_run(
        folder,
        shards,
        "mae",
        "data.streams=12",
        "data.shuffle_shards=1",
        "optim.batch_size=12",
        "optim.micro_batch_size=3",
        "deepspeed=zero3_cpu_fp32",
        "optim.lr=1e-4",  # sums over one rank and over four differ by rounding, which Adam's first steps would blow up
        "optim.eps=1e-4",
        f"optim.steps={STEPS}",
        "checkpoint.every_steps=5",
        "checkpoint.keep_latest=2",
    )


def launch(hosts: Hosts, run_file: Path, *options: str) -> Process:
    hostfile = hosts.hostfile(run_file.parent / "hostfile")
    travels = [word for name in TRAVELS for word in ("--env", name)]
    command = [sys.executable, "-m", "m3i_scale", "launch", str(run_file), "--with", "elastic", "--hostfile"]
    command += [
        str(hostfile),
        "--interface",
        "eth0",
        "--env",
        f"TORCH_EXTENSIONS_DIR={EXTENSIONS}",
        *travels,
        "--restart-pause-s=1",
        *options,
    ]
    return hosts.start("node0", command, log=run_file.parent / "log", env=environment())


def step_of(run_file: Path) -> int:
    path = run_file.parent / "out" / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]  # it is being written
    return max((line["step"] for line in lines if line["kind"] == "train"), default=0)


def attempts(run_file: Path) -> list[dict[str, Any]]:
    path = run_file.parent / "out" / "attempts.json"
    return list(json.loads(path.read_text())) if path.exists() else []


def own_extensions(hosts: Hosts, host: str) -> None:
    """What the reference has built, once more in the memory of a host: hosts with one disk but process tables of their
    own would take each other's locks for those of dead builders."""
    built = os.environ.get("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
    assert hosts.run(host, ["cp", "-a", built, EXTENSIONS]).returncode == 0


def rank_on(hosts: Hosts, host: str) -> psutil.Process:
    """The process that trains there."""
    found = [pid for pid, line in hosts.processes(host).items() if f"{sys.executable} -u -m m3i_scale train" in line]
    return psutil.Process(found[0])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The same run on one rank, undisturbed."""
    run_file = elastic_run(tmp_path_factory.mktemp("reference"), shards)
    alone = train(run_file, "optim.micro_batch_size=12")
    assert alone.wait() == [0], alone.text()[-4000:]
    return metrics(run_file)


def test_a_run_loses_a_rank_and_a_host_takes_it_back_and_is_the_same_run(
    four: Hosts, shards: Path, reference: dict[int, dict[str, Any]], tmp_path: Path
):
    run_file = elastic_run(tmp_path, shards)
    for host in four.names:
        own_extensions(four, host)
    launched = launch(four, run_file, "--max-restarts=2", "--min-nodes=2", "--silence-s=60", "--probe-s=1")
    until(lambda: step_of(run_file) >= 6, launched)
    rank_on(four, "node1").kill()
    until(lambda: len(attempts(run_file)) == 1, launched)
    lost_at = step_of(run_file)
    until(lambda: step_of(run_file) > lost_at, launched)
    four.kill("node3")
    until(lambda: len(attempts(run_file)) == 2, launched)
    lost_at = step_of(run_file)
    until(lambda: step_of(run_file) > lost_at, launched)
    training = [rank_on(four, host) for host in ("node0", "node1", "node2")]
    for rank in training:  # it would be done before a host of a busy machine is back
        rank.suspend()
    four.restart("node3")
    own_extensions(four, "node3")
    until(lambda: "node3 answers again" in launched.text(), launched)
    for rank in training:
        rank.resume()
    assert four.wait(launched) == 0, launched.text()[-6000:]
    assert four.left() == {}

    killed, cut, small, whole = attempts(run_file)
    assert [len(item["hosts"]) for item in (killed, cut, small, whole)] == [4, 4, 3, 4]
    assert [item["micro_batch_size"] for item in (killed, cut, small, whole)] == [3, 3, 4, 3]
    assert [item["status"] for item in (killed, cut, small, whole)] == ["failed", "failed", "preempted", "finished"]
    assert (killed["cause"]["host"], killed["cause"]["rank"], killed["cause"]["exit_code"]) == ("node1", 1, -9)
    assert (cut["cause"]["host"], cut["cause"]["kind"], cut["lost"]) == ("node3", "host", ["node3"])
    assert small["first_step"] % 5 == 0
    assert small["came_back"] == ["node3"]
    assert whole["first_step"] == small["last_step"]
    assert not (run_file.parent / "out" / "failure.json").exists()

    losses = sorted(figures["loss"] for figures in reference.values())
    assert min(b / a for a, b in itertools.pairwise(losses)) > 1 + 1e-7, "losses that tell samples apart"
    ours = metrics(run_file)
    assert sorted(ours) == sorted(reference) == list(range(1, STEPS + 1))
    for step, figures in reference.items():
        assert ours[step]["loss"] == pytest.approx(figures["loss"], rel=1e-5)
        assert ours[step]["samples"] == figures["samples"] == 12 * step
        assert ours[step]["dataset/shapes/epoch"] == pytest.approx(figures["dataset/shapes/epoch"])
