"""Whether a larger micro-batch has room: what hosts have, what `plan` says, and what ranks then do."""

import json
import sys
from pathlib import Path

import pytest
from launch_case import a_script
from tiny import tiny_overrides

from m3i_scale.config import load_run
from m3i_scale.launch.doctor.machine import RankMemory, rank_memory
from m3i_scale.launch.failures import Failure
from m3i_scale.launch.hosts import Host
from m3i_scale.launch.worlds import ComparedSamples, World, refusal_of_plan

HOSTS = tuple(Host(f"node{number}", 2) for number in range(4))
SIZES = ["data.streams=24", "optim.batch_size=192", "optim.micro_batch_size=24"]
ON_HOST = RankMemory(64.0, on_host=True)
WORDS = ("clip", *tiny_overrides("clip"), *SIZES)


def asked(memory: RankMemory, given_gib: float | None = None) -> str | None:
    return refusal_of_plan(WORDS, World(HOSTS[:2], 48), memory, lambda: True, given_gib)


def test_plan_is_asked_with_the_larger_micro_batch():
    assert asked(ON_HOST) is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (json.dumps({"fits": False, "peak_gib_per_rank": 93.2}), "a micro-batch of 48 takes 93.2 GiB"),
        ("", "could not be planned (the policy is not counted)"),
    ],
)
def test_what_has_no_room_or_cannot_be_planned_is_told(tmp_path, monkeypatch, said, told):
    (tmp_path / "said").write_text(said)
    plan = 'cd "$(dirname "$0")"; echo "$*" > asked; cat said; echo "error: the policy is not counted" >&2; exit 2'
    a_script(tmp_path, "python", plan)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert told in str(asked(ON_HOST, 80.0))
    assert "--memory-gib 80.000 " in (tmp_path / "asked").read_text()


def test_memory_that_nobody_knows_is_no_room():
    assert "--memory-gib" in str(asked(RankMemory(None, on_host=False)))


def test_a_larger_micro_batch_that_ran_out_of_memory_is_not_tried_again():
    losses = ComparedSamples(load_run("m3i", SIZES), HOSTS, 2)
    assert losses.usual == 8 * 24
    half = World(HOSTS[:2], 24)
    assert losses.keep(half, lambda world: None)[0].micro_batch_size == 48
    losses.note(Failure(1.0, "node1", 2, 1, "forward", "exception", "ValueError: something else"))
    assert losses.keep(half, lambda world: None)[0].micro_batch_size == 48
    losses.note(Failure(1.0, "node1", 2, 1, "forward", "exception", "OutOfMemoryError: CUDA out of memory. Tried"))
    world, fewer = losses.keep(half, lambda world: None)
    assert world == half
    assert "losses compare 96 samples at a time, were 192" in str(fewer)
    assert losses.keep(World(HOSTS, 24), lambda world: "never asked")[1] is None


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One without `nvidia-smi`."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "dev").mkdir()
    return tmp_path


def test_a_rank_has_what_its_device_has_or_its_share_of_the_host(machine: Path):
    host = rank_memory(1, on_host=False, devices=machine / "dev")
    assert host.on_host
    assert host.gib == pytest.approx(4 * (rank_memory(4, on_host=False, devices=machine / "dev").gib or 0), rel=0.2)
    (machine / "dev" / "kfd").touch()
    assert rank_memory(1, on_host=False, devices=machine / "dev") == RankMemory(None, on_host=False)
    a_script(machine, "nvidia-smi", "echo 81559; echo 40960")
    assert rank_memory(2, on_host=False, devices=machine / "dev") == RankMemory(40.0, on_host=False)
    assert rank_memory(2, on_host=True, devices=machine / "dev").on_host
