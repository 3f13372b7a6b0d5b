"""A run on two hosts with every launcher: the losses of two ranks on one host, the variables that were named and no
others, the interface that was named, and nothing left behind."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from hosts import WAIT_S, Hosts
from launch import environment
from shapes import train, write_run
from watch import losses, ranks, watch

SHORT = ("optim.steps=3", "optim.warmup_steps=1", "checkpoint.every_steps=3")
LAUNCHERS = {
    "pdsh": ["--with", "deepspeed"],
    "torchrun": ["--with", "torchrun"],
}
NAMES = [pytest.param("pdsh", marks=pytest.mark.slow), "torchrun"]
WORDS = """two words, "double", 'single', $HOME `date` \\ ; & | * ~ #"""
SECRET, UNNAMED = "a-secret-that-was-named", "a-secret-that-was-not"
TRAVEL = ("PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "M3I_WORDS", "WANDB_API_KEY")


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[int, float]:
    run = write_run(tmp_path_factory.mktemp("one-host"), shards, "m3i", *SHORT)
    job = train(run, world=2)
    assert job.wait() == [0, 0], job.text()
    return losses(run)


def launch(hosts: Hosts, run: Path, *options: str) -> list[str]:
    hostfile = hosts.hostfile(run.parent / "hostfile")
    named = [option for name in TRAVEL for option in ("--env", name)]
    return [sys.executable, "-m", "m3i_scale", "launch", str(run), *options, "--hostfile", str(hostfile), *named]


def variables() -> dict[str, str]:
    return environment(M3I_WORDS=WORDS, WANDB_API_KEY=SECRET, HF_TOKEN=UNNAMED, M3I_UNNAMED="here")


@pytest.mark.parametrize("name", NAMES)
def test_two_hosts_train_as_one_does(
    hosts: Hosts, shards: Path, tmp_path: Path, on_one_host: dict[int, float], name: str
):
    run = write_run(tmp_path, shards, "m3i", *SHORT)
    before = {card: hosts.traffic("node1", card) for card in ("eth0", "eth1")}
    command = launch(hosts, run, *LAUNCHERS[name], "--interface", "eth1")
    code, seen = watch(hosts, hosts.start("node0", command, log=tmp_path / "log", env=variables()))
    said = (tmp_path / "log").read_text()
    assert code == 0, said[-6000:]
    assert hosts.left() == {}
    assert losses(run) == on_one_host
    assert "Traceback" not in said
    assert "frame #" not in said  # a stack of C++, as a store prints it whose other end has gone

    assert sorted(seen.ranks) == [("node0", "0"), ("node1", "1")]
    for given in seen.ranks.values():
        assert given["M3I_WORDS"] == WORDS
        assert given["WANDB_API_KEY"] == SECRET
        assert given["GLOO_SOCKET_IFNAME"] == given["NCCL_SOCKET_IFNAME"] == "eth1"
        assert "HF_TOKEN" not in given
    assert "M3I_UNNAMED" not in seen.ranks["node1", "1"]
    assert not any(SECRET in text or UNNAMED in text for text in [said, *seen.commands])
    sent = {card: hosts.traffic("node1", card) - before[card] for card in before}
    assert sent["eth1"] > 10 * sent["eth0"], sent


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_is_killed_ends_the_run_on_all_hosts_and_is_told(
    hosts: Hosts, shards: Path, tmp_path: Path, name: str
):
    run = write_run(tmp_path, shards, "clip", "optim.steps=100000", "optim.warmup_steps=1")
    process = hosts.start("node0", launch(hosts, run, *LAUNCHERS[name]), log=tmp_path / "log", env=variables())
    figures, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + WAIT_S
    while not (figures.exists() and "loss" in figures.read_text()):
        assert time.monotonic() < deadline, process.text()[-6000:]
        time.sleep(0.1)
    (rank,) = ranks(hosts, "node1")
    rank.kill()
    assert hosts.wait(process) not in (0, 2, 75)
    assert hosts.left() == {}
    cause = json.loads((tmp_path / "out" / "failure.json").read_text())["cause"]
    assert (cause["host"], cause["rank"], cause["kind"]) == ("node1", 1, "silent")
    assert cause["step"] >= 1
    assert process.text().count("root cause: the rank ended without an error report") == 1


@pytest.mark.slow
def test_a_run_is_stopped_from_any_host_and_the_last_words_say_where_it_goes_on(
    hosts: Hosts, shards: Path, tmp_path: Path
):
    run = write_run(tmp_path, shards, "clip", "optim.steps=100000", "optim.warmup_steps=1")
    process = hosts.start("node0", launch(hosts, run, *LAUNCHERS["pdsh"]), log=tmp_path / "log", env=variables())
    figures, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + WAIT_S
    while not (figures.exists() and "loss" in figures.read_text()):
        assert time.monotonic() < deadline, process.text()[-6000:]
        time.sleep(0.1)
    asked = hosts.run("node1", [sys.executable, "-m", "m3i_scale", "stop", tmp_path / "out"], env=variables())
    assert asked.returncode == 0, asked.stdout
    assert hosts.wait(process) == 75, process.text()[-6000:]
    assert hosts.left() == {}
    last_words = asked.stdout.splitlines()[-1]
    assert last_words.startswith("stopped at step ")
    assert process.text().splitlines()[-1] == last_words


@pytest.mark.slow
def test_a_host_that_deepspeed_itself_does_not_reach_is_named_by_the_ranks_of_the_others(
    hosts: Hosts, shards: Path, tmp_path: Path
):
    run = write_run(tmp_path, shards, "clip", "timeouts.rendezvous_s=8")
    hostfile = hosts.hostfile(tmp_path / "hostfile")
    words = ["--hostfile", hostfile, "--master_addr", hosts.address("node0"), "--no_local_rank", "--module"]
    hosts.link("node1", up=False)
    keep_alive = {"PDSH_SSH_ARGS_APPEND": "-oConnectTimeout=2"}
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={environment()[name]}\n" for name in TRAVEL[:4]))
    done = hosts.run(
        "node0",
        [Path(sys.executable).with_name("deepspeed"), *words, "m3i_scale", "train", run],
        env=variables() | keep_alive | {"DS_ENV_FILE": str(tmp_path / ".deepspeed_env")},
        cwd=tmp_path,
    )
    hosts.link("node1", up=True)
    assert done.returncode not in (0, 2, 75)
    assert "rank 1 (node1) of 2 did not join in 8 s" in done.stdout, done.stdout[-6000:]
    assert hosts.left() == {}


@pytest.mark.slow
def test_hosts_without_a_shared_output_folder_are_told_before_the_first_step(
    hosts: Hosts, shards: Path, tmp_path: Path
):
    run = write_run(tmp_path, shards, "m3i", *SHORT)
    (tmp_path / "out").mkdir()
    hosts.private("node1", tmp_path / "out")
    done = hosts.run("node0", launch(hosts, run, "--with", "deepspeed"), env=variables(), log=tmp_path / "log")
    assert done.returncode == 2, done.stdout[-6000:]
    assert "the ranks must share the output directory: rank 1 on node1 does not see what rank 0 wrote" in done.stdout
    assert "fix: set output_dir to a folder of a file system that all hosts mount" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert hosts.left() == {}
