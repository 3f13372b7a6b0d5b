"""What one of two ranks cannot open: both know, neither waits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import start_ranks

from m3i_scale.config import load_run
from m3i_scale.errors import DataError
from m3i_scale.run import train


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opening")
    job = start_ranks([str(Path(__file__).parent / "opening_case.py"), str(folder)], 2, folder / "logs")
    assert job.wait() == [0, 0], job.text()[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_each_rank_has_its_own(told):
    assert [found["both"] for found in told] == [["", "opened on 0"], ["", "opened on 1"]]


@pytest.mark.parametrize("call", ["check", "open"])
def test_a_fault_of_one_rank_is_raised_on_both(told, call):
    assert [found[call] for found in told] == [["DataError", "no such folder\n  where: rank 1: /data/x"]] * 2


def test_a_rank_that_waits_for_another_hears_of_its_fault(told):
    assert [found["wait"] for found in told] == [["DataError", "a torn shard\n  where: rank 0: s-0.tar"]] * 2


def test_a_mistake_in_the_code_stays_one_where_it_is_made(told):
    assert told[1]["mistake"] == ["KeyError", "'a mistake'"]
    kind, text = told[0]["mistake"]
    assert kind == "UserError"
    assert text.startswith("KeyError: 'a mistake'\n  where: rank 1\n")


@pytest.mark.parametrize("error", [DataError("no such folder", where="/data/x"), PermissionError("not yours")])
def test_what_one_of_several_hosts_finds_is_raised_when_the_ranks_have_met(monkeypatch, error):
    def fails(run, world):
        raise error

    monkeypatch.setattr(train, "resolve_run", fails)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    resolve = train.check_first(load_run("m3i"))
    with pytest.raises(type(error)):
        resolve()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    if isinstance(error, DataError):
        with pytest.raises(DataError):
            train.check_first(load_run("m3i"))
