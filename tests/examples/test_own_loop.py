"""The own loop learns, goes on where it stopped, and takes the steps that the trainer takes, on one rank and on two."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import own_loop
import pytest
from coloured_shapes import make_shards
from launch import ROOT, start_ranks

from m3i_scale.run.setup import run_yaml

pytestmark = pytest.mark.slow

STEPS = 20


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("own-loop"))


@pytest.fixture(scope="module")
def plain(shards: Path) -> list[float]:
    return own_loop.main(["--shards", str(shards), "--steps", str(STEPS)])


def test_the_loss_falls(plain: list[float]) -> None:
    assert len(plain) == STEPS
    assert sum(plain[-4:]) < sum(plain[:4])


def test_accelerate_takes_the_same_steps(shards: Path, plain: list[float]) -> None:
    losses = own_loop.main(["--shards", str(shards), "--steps", str(STEPS), "--accelerate"])
    assert losses == pytest.approx(plain, abs=1e-5)


def test_the_trainer_takes_the_same_steps(shards: Path, plain: list[float], tmp_path: Path) -> None:
    given = ["deepspeed=zero1_cpu_fp32", "log.every_steps=1", "log.progress=false"]
    options = argparse.Namespace(steps=STEPS, output=tmp_path / "out", overrides=given)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(run_yaml(own_loop.read_run(options, shards, ranks=1)))
    job = start_ranks(["-m", "m3i_scale", "train", str(run_file)], 1, tmp_path / "logs")
    assert job.wait() == [0], job.text()[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "train"] == pytest.approx(plain, abs=1e-5)


def test_it_goes_on_to_the_bit_where_it_stopped(shards: Path, plain: list[float], tmp_path: Path) -> None:
    given = ["--shards", str(shards), "--steps", str(STEPS), "--checkpoint", str(tmp_path / "state.pt")]
    assert own_loop.main([*given, "--until", "7"]) + own_loop.main(given) == plain


def test_two_ranks_under_accelerate_take_the_same_steps_and_one_goes_on(
    shards: Path, plain: list[float], tmp_path: Path
) -> None:
    given = ["--shards", str(shards), "--steps", str(STEPS), "--accelerate", "--checkpoint", str(tmp_path / "state.pt")]
    script = [str(ROOT / "examples" / "own_loop.py"), *given, "--until", "8"]
    job = start_ranks(script, 2, tmp_path / "logs", ACCELERATE_USE_CPU="true")
    assert job.wait() == [0, 0], job.text()[-4000:]
    printed = [float(line.split("loss ")[1].split(",")[0]) for line in job.text().splitlines() if "loss" in line]
    assert printed == pytest.approx(plain[:8], abs=1e-4)  # four digits are printed
    assert own_loop.main(given) == pytest.approx(plain[8:], abs=1e-4)
