"""Which hosts make a world."""

import io
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, cast

import pytest
from launch import free_port

from m3i_scale.config import RunConfig, TimeoutsConfig, load_run
from m3i_scale.elastic.agent import Agent
from m3i_scale.elastic.attempts import Launch
from m3i_scale.elastic.link import HostError, Inbox, Link, RemoteShell, receive
from m3i_scale.elastic.rendezvous import HostHistory, Policy, Work
from m3i_scale.elastic.supervise import Attempt, AttemptResult, Logs, Progress
from m3i_scale.elastic.wire import decode
from m3i_scale.elastic.worlds import World, largest_world, micro_batch_for
from m3i_scale.host.failures import Failure
from m3i_scale.launch.hosts import Host


def a_run(*overrides: str) -> RunConfig:
    return load_run("m3i", ["data.streams=24", "optim.batch_size=96", "optim.micro_batch_size=6", *overrides])


def some_work() -> Work:
    return Work(
        a_run(), (), (Host("node0", 1),), RemoteShell(python="python3", workdir="/", output_dir="/out", launch="one")
    )


@pytest.mark.parametrize(
    ("ranks", "size"),
    [
        (4, 6),  # six streams per rank
        (8, 6),
        (3, 8),  # eight streams per rank: six does not fit, nor does anything below
        (2, 12),
        (6, 4),  # four streams per rank: the largest below six
        (12, 4),
        (24, 4),
        (5, None),
        (7, None),
        (48, None),  # more ranks than streams
    ],
)
def test_the_micro_batch_stays_or_is_the_nearest_that_fits(ranks, size):
    assert micro_batch_for(a_run(), ranks) == size


def test_the_largest_number_of_ranks_that_fits_is_taken_and_the_first_hosts_stay():
    hosts = [Host(f"node{number}", 1) for number in range(8)]
    assert largest_world(a_run(), hosts, 1).names == tuple(host.name for host in hosts)
    assert largest_world(a_run(), hosts[:7], 2).ranks == 6
    assert largest_world(a_run(), hosts[:7], 7) is None
    assert largest_world(a_run(), hosts[:5], 3).names == ("node0", "node1", "node2", "node3")
    uneven = [Host("big", 4), Host("small", 1), Host("other", 4)]
    assert largest_world(a_run(), uneven, 1).names == ("big",)  # five and nine do not fit


def test_workers_share_out_the_streams_of_a_rank():
    run = a_run("data.num_workers=4")
    assert micro_batch_for(run, 3) == 8
    assert micro_batch_for(run, 4) is None  # six streams, four workers


def test_a_rank_hangs_beyond_its_time_out_and_the_one_that_has_done_least_is_furthest_behind():
    progress = Progress(TimeoutsConfig(startup_s=3600.0, collective_s=1.0))
    states = [("backward", 1.0), ("forward", 1.0), ("save", 3600.0), ("forward", 3600.0), ("resume", 0.0)]
    beats = {
        str(rank): {"step": 4, "began": 2, "phase": phase, "changed": 0.0, "timeout_s": timeout_s}
        for rank, (phase, timeout_s) in enumerate(states)
    }
    progress.beat("node0", {"time": 100.0, "beats": beats}, {*range(5)})
    assert [progress.hangs(rank) for rank in range(6)] == [True, True, False, False, False, False]
    assert progress.furthest_behind([0, 1, 2]) == 1
    assert progress.furthest_behind([0, 1, 2, 5]) == 5  # of which nothing has been seen
    assert (progress.first_step, progress.last_step) == (2, 4)


def test_the_last_of_ten_thousand_restarts_is_still_one():
    told: list[str] = []
    Launch(some_work(), Policy(max_restarts=10_000, pause_s=0.0), told.append)._pause(9_999)
    assert told == ["restart 9999 of 10000 in 0 s"]


def ended(history: HostHistory, *outcomes: AttemptResult) -> set[str]:
    """Hosts that are failing ones after these attempts."""
    for outcome in outcomes:
        history.ended(World(HOSTS, 6), outcome)
    return history.failing


HOSTS = (Host("node0", 1), Host("node1", 1))
KILLED = AttemptResult("failed", cause=Failure(1.0, "node1", 1, 3, "forward", "signal", "ended by signal 9"))
LOST = AttemptResult("failed", cause=Failure(1.0, "node1", None, 3, "forward", "host", "down"), lost=["node1"])


def test_a_host_fails_twice_running_by_its_ranks_and_not_by_being_lost():
    assert ended(HostHistory(HOSTS), KILLED, KILLED) == {"node1"}
    assert ended(HostHistory(HOSTS), LOST, LOST, LOST) == set()
    assert ended(HostHistory(HOSTS), KILLED, LOST, KILLED) == set()
    assert ended(HostHistory(HOSTS), KILLED, AttemptResult("preempted"), KILLED) == set()


def test_a_port_whose_connections_have_just_ended_is_free_and_one_with_a_listener_is_not(monkeypatch):
    monkeypatch.setattr("m3i_scale.elastic.wire._CLOSE_S", 300.0)

    def asked(port: int) -> dict[str, Any]:
        agent = Agent(output := io.BytesIO())
        agent._send_port(port, None)
        agent.writer.close()
        return cast(dict[str, Any], decode(output.getvalue()))

    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as listener:
        with socket.create_connection(("127.0.0.1", port)) as guest:
            own, _ = listener.accept()
            own.close()  # the first to close keeps the port, as rank 0 does that was killed
            assert guest.recv(1) == b""
        assert "Address already in use" in asked(port)["error"]
    assert asked(port) == {"kind": "port", "port": port, "address": None, "error": None}


def test_processes_that_cannot_be_killed_are_reported_and_keep_their_host_out(tmp_path, monkeypatch):
    def hello(agent: Agent) -> None:
        agent._send_hello({"host": "node0", "launch": "one", "output_dir": str(tmp_path), "silence_s": 30.0})

    def messages(output: io.BytesIO) -> list[dict[str, Any]]:
        return [cast(dict[str, Any], decode(line)) for line in output.getvalue().splitlines()]

    waits = []

    def never_ends(timeout: float) -> int:
        waits.append(timeout)
        time.sleep(0.1)
        raise subprocess.TimeoutExpired("rank", timeout)

    monkeypatch.setattr("m3i_scale.elastic.wire._CLOSE_S", 300.0)
    agent = Agent(output := io.BytesIO())
    hello(agent)
    ranks, environment = [{"RANK": "0"}, {"RANK": "1"}], {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    agent._start({"ranks": ranks, "command": ["sleep", "600"], "cwd": str(tmp_path), "environment": environment})
    for rank in agent.ranks:
        monkeypatch.setattr(rank._process, "wait", never_ends)
    monkeypatch.setattr("m3i_scale.elastic.agent.end_marked", lambda *launch: [42])
    agent._end()
    assert messages(output)[-1] == {"kind": "bye", "left": [42]}
    assert waits[1] < waits[0]  # one deadline for all ranks: the supervisor waits for `bye` only for a time
    after = Agent(output := io.BytesIO())
    hello(after)
    after.writer.close()
    assert "42" in messages(output)[0]["error"]


def test_links_get_a_beat_a_second_however_many_messages_arrive():
    class Counted:
        beats = 0

        def send(self, kind: str, **fields: object) -> None:
            self.beats += kind == "beat"

    links, inbox = [cast(Link, Counted()) for _ in range(3)], Inbox()
    for _ in range(1000):
        inbox.put((links[0], {"kind": "beat"}))
    started = time.monotonic()
    received = sum(1 for _ in receive(links, inbox, lambda: 1.0 - inbox.empty()))
    assert received == 1000
    assert all(1 <= cast(Any, one).beats <= 2 + time.monotonic() - started for one in links)


class Failed:
    """A link to an agent that fails, says good-bye and is gone."""

    host, heard = Host("node1", 1), 0.0

    def send(self, kind: str, **fields: object) -> None:
        self.said = kind

    def error(self) -> HostError:
        return HostError("BlockingIOError: no more processes", "agent")


def an_attempt(link: Link, output_dir: Path) -> Attempt:
    site = RemoteShell(python="python3", workdir="/", output_dir=str(output_dir), launch="one")
    timeouts, logs = TimeoutsConfig(startup_s=60.0, collective_s=60.0), Logs(output_dir)
    attempt = Attempt([link], Inbox(), ["train"], site, timeouts, ("node1", 29500), logs, lambda text: None)
    attempt._start()
    return attempt


def test_an_agent_that_says_good_bye_unasked_is_the_cause_with_its_own_words(tmp_path):
    link = cast(Link, Failed())
    attempt = an_attempt(link, tmp_path)
    attempt._handle(link, {"kind": "bye", "left": []})
    attempt._handle(link, {"kind": "gone"})
    outcome = attempt._conclude()
    assert outcome.lost == ["node1"]
    assert outcome.cause is not None
    assert outcome.cause.message == "the connection to the host ended: BlockingIOError: no more processes"


def test_ranks_that_were_ended_before_they_began_have_saved_nothing(tmp_path):
    link = cast(Link, Failed())
    ended = an_attempt(link, tmp_path)
    assert ended._conclude().status == "failed"
    saved = an_attempt(link, tmp_path)
    saved._handle(link, {"kind": "exit", "rank": 0, "code": 75, "failure": None, "beat": None})
    assert saved._conclude().status == "preempted"
    launch = Launch(some_work(), Policy(), lambda text: None)
    launch._signals = 1
    assert launch._code_after(ended._conclude(), ()) == 130
    assert launch._code_after(saved._conclude(), ()) == 75
