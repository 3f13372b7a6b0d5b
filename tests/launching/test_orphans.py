"""Real runs on this machine: a rank that is killed is told, and a launch that is killed leaves no rank behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import environment, free_port
from shapes import make_shapes, write_run

pytestmark = pytest.mark.slow
WAIT_S = 900
EVER = ("optim.steps=100000", "optim.warmup_steps=1", "checkpoint.every_steps=100000")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))


class Launched:
    """`m3i-scale launch` of two ranks that would train for ever, once it trains."""

    def __init__(self, folder: Path, shards: Path, launcher: str) -> None:
        self.launcher, self.log, self.out = launcher, folder / "log", folder / "out"
        self.below = []
        run = write_run(folder, shards, "clip", *EVER)
        words = ["launch", str(run), "--with", launcher, "--ranks-per-node", "2", "--master-port", str(free_port())]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "m3i_scale", *words],
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def begun(self) -> bool:
        figures = self.out / "metrics.jsonl"
        return figures.exists() and "loss" in figures.read_text()

    def look(self) -> None:
        """At its processes, once it trains."""
        self.until(self.begun)
        self.below = psutil.Process(self.process.pid).children(recursive=True)
        self.ranks = {}
        for process in self.below:
            with contextlib.suppress(psutil.Error):
                variables, command = process.environ(), process.cmdline()
                if "RANK" in variables and command[1:5] == ["-u", "-m", "m3i_scale", "train"]:
                    self.ranks[variables["RANK"]] = process

    def until(self, condition) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def gone(self) -> bool:
        for process in self.below:
            with contextlib.suppress(psutil.NoSuchProcess):  # between the two questions
                if process.is_running() and process.status() != "zombie":
                    return False
        return True

    def end(self) -> None:
        self.below = self.below or psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for process in self.below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@pytest.fixture(params=["local", "torchrun"])
def launched(request, tmp_path, shards):
    launch = Launched(tmp_path, shards, request.param)
    try:
        launch.look()
        yield launch
    finally:
        launch.end()


def test_a_rank_that_is_killed_is_the_root_cause(launched):
    launched.ranks["1"].kill()
    assert launched.process.wait(WAIT_S) not in (0, 2, 75)
    launched.until(launched.gone)
    said = launched.log.read_text()
    cause = json.loads((launched.out / "failure.json").read_text())["cause"]
    assert (cause["rank"], cause["host"]) == (1, os.uname().nodename)
    assert cause["kind"] == ("signal" if launched.launcher == "local" else "silent")
    assert cause["step"] >= 1
    assert said.count("root cause: ") == 1


def test_a_launch_that_is_killed_takes_its_ranks_with_it(launched):
    assert len(launched.ranks) == 2
    os.kill(launched.process.pid, signal.SIGKILL)
    launched.until(launched.gone)
