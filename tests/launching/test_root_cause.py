"""Which of many last words is the cause, and what is read of a rank that was killed."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from m3i_scale.errors import MissingRanksError, UserError
from m3i_scale.host.failures import Failure, failure_text, record_collectives, root_cause, write_failure
from m3i_scale.host.output_dir import RANK_RECORDS, launch_lock, lock_directory
from m3i_scale.host.rank_record import (
    RECORDS,
    Heartbeat,
    forget_records,
    heartbeat_file,
    read_heartbeat,
    read_record,
    read_records,
    record_file,
    recorded,
)
from m3i_scale.host.rank_record import write_record as leave


def failure(time: float, message: str, kind: str = "exception", **more: object) -> Failure:
    values = {"host": "node1", "rank": 3, "step": 7, "phase": "backward"} | more
    return Failure(time=time, message=message, kind=kind, **values)


PEERS = [
    "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:1234",
    "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1000ms for recv",
    "RuntimeError: Rank 0 successfully reached monitoredBarrier, but received errors while waiting for send/recv from "
    "rank 1. Original exception: Read error [10.0.0.1]:99: Connection reset by peer",
    "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error",
    "DistBackendError: [Rank 4] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=41, OpType=ALLREDUCE)",
    "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?",
    "DistStoreError: Socket Timeout",
]


@pytest.mark.parametrize("told", PEERS)
def test_words_about_other_ranks_are_no_cause(told):
    assert failure(1.0, told).is_consequence
    cause = failure(9.0, "OutOfMemoryError: CUDA out of memory")
    assert root_cause([failure(1.0, told), cause, failure(12.0, "ValueError: later")]) == cause


@pytest.mark.parametrize(
    "told",
    ["ValueError: 3 views", "DataError: no sample has arrived for 900 s", "the disk is full", "KeyError: 'text'"],
)
def test_other_errors_are_causes(told):
    assert not failure(1.0, told).is_consequence


def test_a_signal_and_a_lost_host_are_causes_whatever_their_log_says():
    lines = ["Connection closed by peer"]
    assert not failure(1.0, "signal 9", kind="signal", lines=lines).is_consequence
    assert not failure(1.0, "the connection to the host ended", kind="host", rank=None).is_consequence
    assert failure(1.0, "exit code 1", kind="exit", lines=lines).is_consequence


def test_a_server_of_shards_that_is_gone_is_a_mistake_to_mend_and_no_other_ranks_end():
    told = "cannot read the shard: connection lost\n  why: ClientConnectorError: [Errno 111] Connection refused"
    mistake = failure(1.0, told, kind="user_error", exit_code=2)
    assert not mistake.is_consequence
    cause = root_cause([mistake, failure(2.0, "signal 6", kind="signal", exit_code=-6), failure(1.5, PEERS[3])])
    assert cause == mistake
    assert cause.user_error  # so it is not started again


def test_where_nothing_else_is_known_the_first_consequence_stands_for_it():
    early, late = failure(1.0, PEERS[0]), failure(2.0, PEERS[1])
    assert root_cause([late, early]) == early
    assert root_cause([]) is None


def test_the_text_names_the_place_once_and_counts_the_rest(tmp_path):
    cause, others = failure(1.0, "ValueError: x", lines=["a", "b"]), [failure(2.0 + n, PEERS[0]) for n in range(5)]
    text = failure_text(cause, others, tmp_path)
    assert "root cause: ValueError: x\n  where: host node1, rank 3, after step 7, in backward" in text
    assert "5 × RuntimeError" in text
    path = write_failure(tmp_path, cause, others, attempt=2)
    content = json.loads(path.read_text())
    assert (content["cause"]["rank"], len(content["others"]), content["attempt"]) == (3, 5, 2)
    assert list(tmp_path.iterdir()) == [path]


def _die(heartbeat: Heartbeat) -> None:
    heartbeat.at("other", 4)
    heartbeat.at("decoder")
    raise ValueError("three")


def test_a_rank_leaves_its_last_words_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv(RECORDS, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="three"), recorded(tmp_path / "out") as heartbeat:
        _die(heartbeat)
    seen = read_heartbeat(heartbeat_file(tmp_path, 3))
    assert (seen.step, seen.began, seen.phase) == (4, 4, "decoder")
    record = json.loads((tmp_path / "rank-00003.json").read_text())
    assert (record["message"], record["step"], record["phase"]) == ("ValueError: three", 4, "decoder")
    assert any("ValueError(" in line for line in record["trace"])


def test_under_other_launchers_records_lie_in_the_output_folder(tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(RECORDS, raising=False)
    with pytest.raises(UserError), recorded(tmp_path):
        raise UserError("a mistake", fix="mend it")
    (record,) = read_records(tmp_path)
    assert (record.kind, record.rank, record.user_error) == ("user_error", 1, True)
    forget_records(tmp_path)
    assert read_records(tmp_path) == []


def test_ranks_of_a_host_note_in_one_file_that_they_run(tmp_path, monkeypatch):
    """At thousands of ranks, a file of each at every start would be thousands on a shared disk."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv(RECORDS, raising=False)
    monkeypatch.setenv("RANK", "0")
    with recorded(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with recorded(tmp_path):
            assert len(list((tmp_path / RANK_RECORDS).iterdir())) == 1
            assert [(record.rank, record.kind) for record in read_records(tmp_path)] == [(0, "silent"), (1, "silent")]
        assert [(record.rank, record.host) for record in read_records(tmp_path)] == [(0, os.uname().nodename)]
    assert list(tmp_path.iterdir()) == []


def test_collectives_are_recorded_in_the_folder_and_what_the_user_has_set_stays(tmp_path):
    folder, environment = tmp_path / "failure", {"RANK": "3"}
    with record_collectives(folder, environment):
        prefix = Path(environment["TORCH_FR_DUMP_TEMP_FILE"])
        assert "torchfrtrace" not in failure_text(failure(1.0, "x"), [], tmp_path)
        prefix.with_name(f"{prefix.name}3").write_bytes(b"as PyTorch does at a time-out")
    text = failure_text(failure(1.0, "x"), [], tmp_path)
    assert f"1 rank wrote down its last collectives: torchfrtrace {folder}" in text
    with record_collectives(folder, environment):  # the next attempt
        assert list(folder.iterdir()) == []
    assert not folder.exists()
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        set_already = {"RANK": "3", name: "/data/collectives-"}
        given = dict(set_already)
        with record_collectives(folder, given):
            assert given == set_already


def test_a_folder_that_takes_no_records_does_not_hide_what_the_run_says(tmp_path, monkeypatch, capsys):
    """On several ranks the record is the first to touch the output folder."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(RECORDS, raising=False)
    (tmp_path / "occupied").write_text("")
    with pytest.raises(UserError) as caught, recorded(tmp_path / "occupied" / "out"):
        raise UserError("the output directory is no folder", where="here")
    assert caught.value.where == "here"
    assert "no record of this failure" in capsys.readouterr().err


def test_a_rank_that_is_alone_leaves_nothing(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", RECORDS):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="x"), recorded(tmp_path):
        raise ValueError("x")
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        leave(tmp_path, failure(1.0, "x"))
    assert list(tmp_path.iterdir()) == []


def test_the_lock_names_its_holder(tmp_path):
    with launch_lock(tmp_path), pytest.raises(UserError) as caught, launch_lock(tmp_path):
        pass
    assert f"pid {os.getpid()} on host" in str(caught.value)
    with launch_lock(tmp_path):
        pass


@pytest.mark.parametrize("hold", [launch_lock, lock_directory])
def test_who_looks_at_a_lock_in_that_instant_does_not_keep_it(tmp_path, monkeypatch, hold):
    with hold(tmp_path):
        pass
    looks = [path.open("rb") for path in tmp_path.glob(".*lock")]
    for file in looks:
        fcntl.flock(file, fcntl.LOCK_SH)
    monkeypatch.setattr("m3i_scale.host.output_dir.ACQUIRE_S", 300.0)
    monkeypatch.setattr("time.sleep", lambda seconds: [file.close() for file in looks])
    with hold(tmp_path):
        assert all(file.closed for file in looks)


def test_a_rank_that_waited_for_others_that_did_not_come_is_not_to_blame(tmp_path, monkeypatch):
    """Its host is well. Theirs may say nothing, or only that they did not reach it."""
    monkeypatch.setenv(RECORDS, str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(MissingRanksError), recorded(tmp_path / "out"):
        raise MissingRanksError("ranks 8–15 of 16 did not join in 600 s")
    waited = read_record(record_file(tmp_path, 0))
    assert waited is not None
    assert waited.is_consequence
    assert not waited.user_error
    lost = failure(waited.time + 9, "the connection to the host ended", kind="host", rank=None)
    assert root_cause([waited, lost]) == lost
    assert root_cause([waited, failure(waited.time + 9, PEERS[0])]) == waited  # where nothing else is known
