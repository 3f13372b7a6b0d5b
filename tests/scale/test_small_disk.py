"""Disks that fill up or are read-only, and one job per output directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint_files import fill, save

from m3i_scale.checkpoint.commit import begin, commit, write_guard
from m3i_scale.checkpoint.layout import step_name
from m3i_scale.checkpoint.manifest import newest_good
from m3i_scale.checkpoint.stream import write_tensors
from m3i_scale.errors import CheckpointError
from m3i_scale.host.output_dir import Holder, holder_of, lock_directory


def test_a_disk_that_fills_up_during_a_save(small_disk: Path) -> None:
    good = save(small_disk, 100)
    temporary = begin(small_disk / step_name(200))
    with pytest.raises(CheckpointError) as caught, write_guard(small_disk, temporary, bytes_wanted=3 << 20):
        write_tensors(temporary / "big", {"t": torch.zeros(1 << 19)})
    message = str(caught.value)
    assert "the disk is full" in message
    assert "3.00 MiB wanted" in message
    assert " free" in message
    assert str(temporary / "big") in message
    assert f"the last good checkpoint is {good}" in message
    assert not temporary.exists()
    assert newest_good(small_disk) == (good, [])
    again = save(small_disk, 200)  # there is room again
    assert newest_good(small_disk) == (again, [])


def test_the_last_good_checkpoint_is_named_without_being_read_again(small_disk: Path) -> None:
    good = begin(small_disk / step_name(100))
    fill(good, {"weights": b"x" * (1 << 19)})
    commit(small_disk / step_name(100), good, {"step": 100})
    before = _bytes_read()
    with pytest.raises(CheckpointError) as caught:
        begin(small_disk / step_name(200), 1 << 40)
    assert step_name(100) in (caught.value.why or "")
    assert _bytes_read() - before < 1 << 18


def _bytes_read() -> int:
    """Count what this process has asked files for, in bytes."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_other_errors_pass_the_guard_unchanged(tmp_path: Path) -> None:
    temporary = begin(tmp_path / step_name(1))
    with pytest.raises(RuntimeError, match="shapes differ"), write_guard(tmp_path, temporary):
        raise RuntimeError("shapes differ")
    assert temporary.exists()
    with pytest.raises(CheckpointError) as caught, write_guard(tmp_path, temporary, remove_folder=False):
        raise OSError(errno.EDQUOT, "")
    assert caught.value.where == str(temporary)
    assert "quota" in caught.value.what
    assert temporary.exists()


def test_a_disk_that_is_full_when_the_manifest_is_written(small_disk: Path) -> None:
    good = save(small_disk, 100)
    final = small_disk / step_name(200)
    temporary = begin(final)
    fill(temporary)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(b"x" * (2 << 20))
    with pytest.raises(CheckpointError) as caught:
        commit(final, temporary, {})
    assert caught.value.where == str(temporary / "manifest.json")
    assert not temporary.exists()
    assert newest_good(small_disk) == (good, [])


def test_a_save_that_has_no_room_does_not_begin(small_disk: Path) -> None:
    root = small_disk / "run" / "checkpoints"
    (root / ".tmp-step-00000001").mkdir(parents=True)
    (root / ".tmp-step-00000001" / "half").write_bytes(b"x" * (1 << 19))
    with pytest.raises(CheckpointError) as caught:
        begin(root / step_name(1), 5_000_000)
    assert str(caught.value.where).endswith("/disk/run/checkpoints")
    assert "4.77 MiB" in caught.value.what
    assert list(root.iterdir()) == []
    begin(root / step_name(1), 900_000)  # what a failed save left makes room


def test_a_read_only_disk_is_explained_and_can_still_be_read(small_disk: Path) -> None:
    good = save(small_disk, 100)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError) as caught:
        begin(small_disk / step_name(200))
    assert str(good) in (caught.value.why or "")
    with pytest.raises(CheckpointError) as caught, lock_directory(small_disk):
        pass
    assert caught.value.where == str(small_disk)
    assert newest_good(small_disk) == (good, [])


# ------------------------------------------------------------------ one job per output directory

HOLDER = """
import sys, time
from pathlib import Path
from m3i_scale.host.output_dir import lock_directory
with lock_directory(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_job_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError) as caught, lock_directory(tmp_path):
            pass
        assert caught.value.where == str(tmp_path)
        assert f"pid {first.pid} on host {socket.gethostname()} since 20" in str(caught.value)
    finally:
        first.kill()
        first.communicate()
    with lock_directory(tmp_path):
        assert holder_of(tmp_path) == Holder(os.getpid(), socket.gethostname(), mock.ANY)
    assert holder_of(tmp_path) is None


def test_a_holder_that_ended_while_its_child_lives_is_told_apart(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    note = {"pid": ended.pid, "host": socket.gethostname(), "since": "2030-01-01"}
    (tmp_path / ".lock-holder.json").write_text(json.dumps(note))
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="a process that it started has not"), lock_directory(tmp_path):
            pass
        (tmp_path / ".lock-holder.json").unlink()
        with pytest.raises(CheckpointError, match="a job that is just starting"), lock_directory(tmp_path):
            pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_flock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CheckpointError) as caught, lock_directory(tmp_path):
        pass
    assert caught.value.where == str(tmp_path)
