"""What is told, once, of a run whose launcher watches no rank: ranks are real processes that die in real ways."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from m3i_scale.host.failures import Failure, write_failure
from m3i_scale.host.output_dir import FAILURE, RANK_RECORDS
from m3i_scale.host.rank_record import read_records, write_record
from m3i_scale.launch import Command, LaunchPlan
from m3i_scale.launch.execute import LaunchResult, execute
from m3i_scale.launch.exit_reason import conclude, main, report_failure

ROOT = Path(__file__).resolve().parents[2]
PLAYS = str(ROOT / "tests" / "cluster" / "playing_rank.py")
PORT = "29500"


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr("m3i_scale.launch.execute._GRACE_S", 120.0)


def ranks(folder, *parts, ranks=True, steps=4):
    """A launch of two ranks that play parts; its ending and what is told of it."""
    common = {"WORLD_SIZE": "2", "MASTER_PORT": PORT}
    commands = tuple(
        Command((sys.executable, PLAYS, str(folder), str(steps), *parts), {**common, "RANK": str(rank)})
        for rank in range(2)
    )
    plan = LaunchPlan("test", folder / "launch", (), commands, folder, ranks=ranks)
    ending = execute(plan, plan, os.environ)
    return ending, conclude(folder, ending, plan, 2)


def cause(folder):
    return json.loads((folder / FAILURE).read_text())["cause"]


def test_a_killed_rank_is_told_with_its_signal_and_the_step_that_others_know(tmp_path):
    ending, told = ranks(tmp_path, "kill@1@3", "patient@0@3")
    assert ending.code == 137
    found = cause(tmp_path)
    assert (found["rank"], found["kind"], found["exit_code"], found["step"]) == (1, "signal", -9, 2)
    assert told.startswith("root cause: the rank was ended by signal 9 (SIGKILL)\n")
    assert told.count("root cause") == 1
    assert "1 × RuntimeError: [gloo/transport" in told
    assert str(tmp_path / FAILURE) in told


def test_where_nobody_sees_the_ranks_the_one_that_said_nothing_is_told(tmp_path):
    _, told = ranks(tmp_path, "kill@1@3", "patient@0@3", ranks=False)
    found = cause(tmp_path)
    assert (found["rank"], found["kind"], found["step"]) == (1, "silent", 2)
    assert "the rank ended without an error report" in told


@pytest.mark.parametrize("seen", [True, False])
def test_an_error_comes_before_those_that_were_ended_for_it(tmp_path, monkeypatch, seen):
    monkeypatch.setattr("m3i_scale.launch.execute._GRACE_S", 0.5)
    ending, told = ranks(tmp_path, "user@1@3", ranks=seen)
    assert ending.code == 1
    assert ending.forced == {0}
    found = cause(tmp_path)
    assert (found["rank"], found["kind"], found["step"]) == (1, "user_error", 2)
    assert "fix: copy it again" in told


def test_a_run_that_finishes_leaves_no_word_of_any_failure(tmp_path):
    write_failure(tmp_path, Failure(1.0, "node1", 0, 1, "step", "exit", "of an earlier launch"), [])
    ending, told = ranks(tmp_path)
    assert (ending.code, told) == (0, None)
    assert not (tmp_path / FAILURE).exists()
    assert not (tmp_path / RANK_RECORDS).exists()


def test_while_it_runs_each_rank_has_left_what_is_told_if_it_is_killed(tmp_path):
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": PORT}
    done = subprocess.run([sys.executable, PLAYS, str(tmp_path), "3", "kill@0@2"], env=environment, check=False)
    assert done.returncode == -9
    (record,) = read_records(tmp_path)
    assert (record.rank, record.kind, record.host) == (0, "silent", os.uname().nodename)


def failed(code=1, **more):
    return LaunchResult(code=code, codes=[code], times=[1.0], **more)


def test_what_is_preempted_or_interrupted_has_not_failed(tmp_path):
    write_failure(tmp_path, Failure(1.0, "node1", 0, 1, "step", "exit", "of an earlier launch"), [])
    plan = LaunchPlan("test", tmp_path, (), (Command(("torchrun",)),), tmp_path)
    assert conclude(tmp_path, failed(75), plan, 2) is None
    assert conclude(tmp_path, failed(143, stop_requests=1), plan, 2) is None  # by the signal, before it could save
    write_record(tmp_path / RANK_RECORDS, record(0, "exception", "KeyboardInterrupt: "))
    assert conclude(tmp_path, failed(130, stop_requests=1), plan, 2) is None
    assert conclude(tmp_path, failed(130, stop_requests=2), plan, 2) is None
    assert cause(tmp_path)["message"] == "of an earlier launch"


def record(rank, kind, message="x", time=1.0, **more):
    return Failure(time, "node1", rank, more.pop("step", None), None, kind, message, **more)


def test_of_several_that_say_nothing_none_is_named_the_first(tmp_path):
    """A launcher ends those that are left: what is blocked in a collective dies like the one that was killed."""
    told = report_failure(tmp_path, 1, [record(0, "silent"), record(1, "silent")], 2)
    assert "ranks 0, 1 ended without an error report" in told
    assert "which was the first is not known" in told
    assert cause(tmp_path)["rank"] is None


def test_a_rank_that_never_began_is_named_beside_those_that_were_ended_for_it(tmp_path):
    told = report_failure(tmp_path, 1, [record(0, "silent")], 2)
    assert "rank 1 left nothing: ended before it began" in told
    assert cause(tmp_path)["rank"] is None


def test_what_fails_while_others_save_is_told(tmp_path):
    words = [record(0, "silent"), record(1, "user_error", "the disk is full", exit_code=2)]
    assert "root cause: the disk is full" in report_failure(tmp_path, 75, words, 2)
    assert (
        report_failure(tmp_path, 75, [record(0, "silent"), record(1, "exception", "Connection closed by peer")], 2)
        is None
    )


def test_an_end_that_was_forced_keeps_what_the_rank_has_said(tmp_path):
    """It may hang after its last words, and others give up waiting for it first."""
    write_record(tmp_path / RANK_RECORDS, record(0, "exception", "ValueError: the real cause", 1.0))
    write_record(tmp_path / RANK_RECORDS, record(1, "exception", "Timed out waiting 1000ms", 2.0))
    plan = LaunchPlan("test", tmp_path, (), (), tmp_path, ranks=True)
    ending = LaunchResult(code=1, codes=[-15, 1], times=[62.0, 2.0], forced={0})
    assert "root cause: ValueError: the real cause" in conclude(tmp_path, ending, plan, 2)


def test_no_secret_stands_in_what_is_written_or_told(tmp_path):
    told = report_failure(tmp_path, 1, [record(0, "exception", "403: https://me:plutonium@h/a.tar?sig=plutonium")], 1)
    assert "403: https://" in told
    assert "plutonium" not in told + (tmp_path / FAILURE).read_text()


def test_a_kill_after_a_request_to_stop_is_told_all_the_same(tmp_path):
    """Out of memory while it saves."""
    write_record(tmp_path / RANK_RECORDS, record(0, "silent", "ended without an error report"))
    plan = LaunchPlan("test", tmp_path, (), (Command(("torchrun",)),), tmp_path)
    assert "without an error report" in conclude(tmp_path, failed(137, stop_requests=1), plan, 1)


def test_a_command_that_starts_no_rank_is_told_itself(tmp_path):
    plan = LaunchPlan("test", tmp_path, (), (Command(("ssh", "node2", "…", "x" * 500)),), tmp_path)
    told = conclude(tmp_path, failed(255), plan, 2)
    assert "no rank reported an error (exit code 255): ssh node2" in told
    assert len(told) < 700
    assert cause(tmp_path)["rank"] is None


def test_a_folder_that_takes_no_file_hides_nothing(tmp_path):
    (tmp_path / "out").write_text("a file")
    plan = LaunchPlan("test", tmp_path, (), (Command(("ssh", "node2")),), tmp_path)
    told = conclude(tmp_path / "out", failed(255), plan, 2)
    assert "exit code 255" in told
    assert "not written" in told


def test_a_job_script_says_the_same_at_its_end(tmp_path, monkeypatch, capsys):
    ranks(tmp_path, "exception@0@2", "patient@1@2", ranks=False)
    (tmp_path / FAILURE).unlink()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["verdict", str(tmp_path), "1", "2"])
    main()
    assert capsys.readouterr().err.startswith("root cause: RuntimeError: the cause: a value that nobody thought of\n")
    assert cause(tmp_path)["rank"] == 0


def test_a_host_that_ssh_does_not_reach_is_named(tmp_path):
    plan = LaunchPlan("test", tmp_path, (), (Command(("ssh", "node2", "x"), host="node2"),), tmp_path)
    told = conclude(tmp_path, failed(255), plan, 2)
    assert "root cause: ssh did not reach the host, or lost it (exit code 255)" in told
    assert "where: host node2" in told


def over_ssh(tmp_path):
    commands = (Command(("bash", "torchrun.sh", "0")), Command(("ssh", "node2", "x"), host="node2"))
    return LaunchPlan("test", tmp_path, (), commands, tmp_path)


@pytest.mark.parametrize("kind", ["silent", "exception"])
def test_a_host_that_ssh_loses_is_the_cause_and_not_the_ranks_that_waited_for_it(tmp_path, kind):
    """They are ended when nobody comes back, or notice themselves that a connection is gone."""
    write_record(tmp_path / RANK_RECORDS, record(0, kind, "Connection closed by peer", step=7))
    write_record(tmp_path / RANK_RECORDS, record(1, "silent"))
    conclude(tmp_path, LaunchResult(code=255, codes=[-9, 255], times=[180.0, 60.0], forced={0}), over_ssh(tmp_path), 2)
    found = cause(tmp_path)
    assert (found["host"], found["rank"], found["kind"], found["step"]) == ("node2", None, "host", 7)


def test_an_ssh_that_the_launch_has_ended_itself_is_no_lost_host(tmp_path):
    write_record(tmp_path / RANK_RECORDS, record(0, "user_error", "the disk is full", exit_code=2))
    write_record(tmp_path / RANK_RECORDS, record(1, "silent"))
    conclude(tmp_path, LaunchResult(code=2, codes=[2, 255], times=[60.0, 120.0], forced={1}), over_ssh(tmp_path), 2)
    assert cause(tmp_path)["message"] == "the disk is full"


def test_ranks_of_several_hosts_that_say_nothing_blame_none_of_them(tmp_path):
    silent = [record(0, "silent"), Failure(2.0, "node2", 1, None, None, "silent", "x")]
    report_failure(tmp_path, 1, silent, 2)
    assert cause(tmp_path)["host"] == "node1, node2"


def test_a_stop_that_comes_before_ranks_can_save_has_not_failed_under_deepspeed(tmp_path):
    """Its launcher ends with the number of their signal below zero."""
    plan = a_rank_that_is_asked_early(tmp_path)
    ending = execute(plan, plan, os.environ)
    assert ending.code == 128 + signal.SIGUSR2
    assert conclude(tmp_path, ending, plan, 1) is None


def a_rank_that_is_asked_early(folder):
    # The launch hands the signal back to it, which must not end it in another way.
    deaf = "signal.signal(signal.SIGUSR2, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    asks = f"os.kill({os.getpid()}, signal.SIGUSR2); raise SystemExit(-signal.SIGUSR2)"
    program = f"import os, signal; {deaf}; {asks}"
    return LaunchPlan("test", folder, (), (Command((sys.executable, "-c", program)),), folder)
