"""Directories that commit: killed, filled up, flipped, fought over."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3i_scale.errors import CheckpointError
from m3i_scale.scale.checkpoint import commit as room
from m3i_scale.scale.checkpoint.commit import (
    begin,
    commit,
    digest_files,
    ensure_space,
    hash_file,
    lock_directory,
    newest_good,
    prune,
    read_manifest,
    step_name,
    step_of,
    sweep,
    temporary_for,
    verify,
    write_guard,
)

FILES = {
    "meta.json": b"{}",
    "deepspeed/rank-0.pt": b"zero" * 700,
    "deepspeed/rank-1.pt": b"",
    "momentum/a/b.bin": b"m" * 9,
}


def fill(folder: Path, files: dict[str, bytes] = FILES) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def save(root: Path, step: int) -> Path:
    final = root / step_name(step)
    temporary = begin(final)
    fill(temporary)
    commit(final, temporary, {"step": step, "world_size": 2})
    return final


def flip(path: Path, position: int = 0, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)


# ------------------------------------------------------------------ commit


def test_commit_makes_a_checkpoint_that_verifies(tmp_path: Path) -> None:
    final = save(tmp_path, 100)
    assert verify(final) == []
    assert newest_good(tmp_path) == (final, [])
    assert (tmp_path / "latest").read_text() == "step-00000100\n"
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000100", "latest"}
    manifest = read_manifest(final)
    assert manifest.extra == {"step": 100, "world_size": 2}
    expected = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in FILES.items()}
    assert {name: (entry.size, entry.sha256) for name, entry in manifest.files.items()} == expected


def test_everything_is_on_disk_before_the_rename_and_the_rename_before_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / step_name(100)
    temporary = begin(final)
    fill(temporary)
    log: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def logged_fsync(descriptor: int) -> None:
        log.append(str(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path)))
        fsync(descriptor)

    def logged_rename(path: Path, target: Path) -> Path:
        log.append("RENAME")
        return rename(path, target)

    def logged_replace(source: Path, target: Path) -> None:
        log.append("LATEST")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    monkeypatch.setattr(os, "replace", logged_replace)
    commit(final, temporary, {})
    before, after = log[: log.index("RENAME")], log[log.index("RENAME") + 1 :]
    name = temporary.name
    folders = {name, f"{name}/deepspeed", f"{name}/momentum", f"{name}/momentum/a"}
    assert set(before) == {f"{name}/{file}" for file in FILES} | folders | {f"{name}/manifest.json"}
    assert before[-2:] == [f"{name}/manifest.json", name]
    assert after == [".", ".tmp-latest", "LATEST", "."]


def test_ranks_hash_their_own_files_and_rank_0_reads_none_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / step_name(1)
    temporary = begin(final)
    fill(temporary)
    names = sorted(FILES)
    parts = [digest_files(temporary, names[:2]), digest_files(temporary, names[2:3])]
    read: list[str] = []
    monkeypatch.setattr(
        "m3i_scale.scale.checkpoint.manifest.hash_file", lambda path: read.append(path.name) or hash_file(path)
    )
    commit(final, temporary, {}, digests={**parts[0], **parts[1]})
    assert read == [Path(names[3]).name]
    monkeypatch.undo()
    assert verify(final) == []


def test_a_file_that_is_not_as_its_rank_left_it_stops_the_commit(tmp_path: Path) -> None:
    final = tmp_path / step_name(1)
    temporary = begin(final)
    fill(temporary)
    digests = digest_files(temporary, FILES)
    (temporary / "meta.json").write_bytes(b"longer than before")
    with pytest.raises(CheckpointError, match="18 bytes, the rank that wrote it counted 2"):
        commit(final, temporary, {}, digests=digests)
    (temporary / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"not there: meta\.json"):
        commit(final, temporary, {}, digests=digests)
    assert newest_good(tmp_path) == (None, [])


def test_a_link_is_refused(tmp_path: Path) -> None:
    temporary = begin(tmp_path / step_name(1))
    (temporary / "secret").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="neither a file nor a directory"):
        commit(tmp_path / step_name(1), temporary, {})
    (temporary / "secret").unlink()
    (temporary / "folder").symlink_to("/etc")
    with pytest.raises(CheckpointError, match="neither a file nor a directory"):
        commit(tmp_path / step_name(1), temporary, {})


def test_a_good_checkpoint_is_never_written_over_and_a_broken_one_is_replaced(tmp_path: Path) -> None:
    final = save(tmp_path, 100)
    with pytest.raises(CheckpointError, match="is there already"):
        begin(final)
    leftover = temporary_for(final)
    leftover.mkdir()
    with pytest.raises(CheckpointError, match="is there already"):
        commit(final, leftover, {})
    flip(final / "meta.json")
    save(tmp_path, 100)
    assert newest_good(tmp_path) == (final, [])
    assert list(tmp_path.glob(".tmp-*")) == []


def test_begin_starts_from_an_empty_folder(tmp_path: Path) -> None:
    left = temporary_for(tmp_path / step_name(100))
    fill(left, {"half": b"written"})
    assert list(begin(tmp_path / step_name(100)).iterdir()) == []


def test_commit_wants_a_step_folder_beside_a_temporary_one(tmp_path: Path) -> None:
    for final, temporary in (("step-1", ".tmp-x"), ("step-00000001", "x"), ("a/step-00000001", ".tmp-x")):
        with pytest.raises(ValueError, match="in one folder"):
            commit(tmp_path / final, tmp_path / temporary, {})


def test_extra_that_is_not_json_commits_nothing(tmp_path: Path) -> None:
    final = tmp_path / step_name(1)
    with pytest.raises(ValueError, match="JSON"):
        commit(final, begin(final), {"loss": float("nan")})
    assert newest_good(tmp_path) == (None, [])


def test_step_names() -> None:
    assert step_name(7) == "step-00000007"
    assert step_of(Path("/data/run/step-123456789")) == 123456789
    for other in ("step-7", "step-00000007.bak", ".tmp-step-00000007", "latest"):
        assert step_of(Path(other)) is None


# ------------------------------------------------------------------ kill -9

KILLER = """
import os, shutil, signal, sys
from pathlib import Path
from m3i_scale.scale.checkpoint.commit import begin, commit, lock_directory, prune, step_name

base, out = Path(sys.argv[1]), Path(sys.argv[2])
count = 0

def point(name, arguments):
    # Called by the interpreter before it opens, renames, makes or removes anything; also round every fsync.
    global count
    inside = any(isinstance(item, (str, os.PathLike)) and str(item).startswith(target) for item in arguments)
    if inside or name in ("os.remove", "os.rmdir"):  # shutil.rmtree names files relative to an open folder
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

def train():
    real = os.fsync
    def fsync(descriptor):
        point("fsync", (target,))
        real(descriptor)
        point("fsync", (target,))
    os.fsync = fsync
    sys.addaudithook(point)
    root = Path(target) / "checkpoints"
    with lock_directory(Path(target)):
        final = root / step_name(200)
        temporary = begin(final)
        for name in ("meta.json", "deepspeed/rank-0.pt"):
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(b"new" * 1000)
        commit(final, temporary, {"step": 200})
        prune(root, 1, committed=final)

at, killed = 0, True
while killed:
    at += 1
    target = str(out / f"{at:03d}")
    shutil.copytree(base, target)
    child = os.fork()
    if child == 0:
        try:
            train()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status)
    if not killed and os.WEXITSTATUS(status):
        sys.exit("the save itself failed")
print(at - 1)
"""


def test_killed_at_every_point_of_a_save_the_root_resolves_to_a_good_checkpoint(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "killed"
    old = save(base / "checkpoints", 100)
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLER, base, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout)
    assert kills >= 40
    seen = set()
    for number in range(1, kills + 1):
        root = out / f"{number:03d}" / "checkpoints"
        good, passed_over = newest_good(root)
        assert good is not None, number
        assert passed_over == [], number
        assert all(verify(path) == [] for path in room.checkpoints(root)), number
        assert verify(root / (root / "latest").read_text().strip()) == [], number
        seen.add((good.name, temporary_for(root / step_name(200)).exists()))
        with lock_directory(root.parent) as lock:  # the kernel has let go of the killed job's lock
            sweep(root, lock)
            assert not list(root.glob(".tmp-*")), number
            if good.name == old.name:
                save(root, 200)
        assert newest_good(root) == (root / step_name(200), [])
    # Both sides of the commit were hit: nothing written yet, half written, committed.
    assert seen == {("step-00000100", False), ("step-00000100", True), ("step-00000200", False)}


# ------------------------------------------------------------------ verify


def test_verify_names_each_fault(tmp_path: Path) -> None:
    final = save(tmp_path, 100)
    flip(final / "deepspeed/rank-0.pt", 1000)
    (final / "momentum/a/b.bin").write_bytes(b"m" * 8)
    (final / "meta.json").unlink()
    (final / "deepspeed/more").write_bytes(b"x")
    assert verify(final) == [
        "meta.json: missing",
        "deepspeed/more: not in the manifest",
        "deepspeed/rank-0.pt: the contents have changed (SHA-256 differs)",
        "momentum/a/b.bin: 8 bytes, the manifest says 9",
    ]
    assert len(verify(final, contents=False)) == 3


def test_verify_of_what_was_never_committed(tmp_path: Path) -> None:
    assert verify(tmp_path / "nowhere") == ["no manifest: the folder was never committed"]
    final = save(tmp_path, 1)
    (final / "link").symlink_to("/etc/passwd")
    assert verify(final) == ["'link' is neither a file nor a directory"]


def test_a_manifest_torn_anywhere_is_found(tmp_path: Path) -> None:
    final = save(tmp_path, 100)
    path = final / "manifest.json"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert verify(final) == ["the manifest is torn or changed"], length


def test_a_manifest_of_another_format_is_named(tmp_path: Path) -> None:
    final = save(tmp_path, 100)
    values = json.loads((final / "manifest.json").read_bytes())
    (final / "manifest.json").write_text(json.dumps({**values, "format": 99}))
    assert verify(final) == ["the manifest has format 99, this version reads 1"]


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    final = save(tmp_path, 100)
    (tmp_path / "outside").write_bytes(b"private")
    manifest = read_manifest(final)
    stranger = room.Digest(7, hash_file(tmp_path / "outside"))
    (final / "manifest.json").unlink()
    room.write_manifest(final, {**manifest.files, "../outside": stranger}, {})
    assert verify(final) == ["../outside: missing"]


@pytest.fixture(scope="module")
def good_checkpoint() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield save(Path(folder), 100)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_or_truncation_is_found(good_checkpoint: Path, data: st.DataObject) -> None:
    names = sorted(name for name, content in {**FILES, "manifest.json": b"?"}.items() if content)
    path = good_checkpoint / data.draw(st.sampled_from(names))
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    try:
        if data.draw(st.booleans()):
            flip(path, position, data.draw(st.integers(1, 255)))
        else:
            path.write_bytes(whole[:position])
        assert verify(good_checkpoint) != []
    finally:
        path.write_bytes(whole)
    assert verify(good_checkpoint) == []


# ------------------------------------------------------------------ fall back, retention, sweep


def test_newest_good_says_what_it_passed_over(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "nowhere") == (None, [])
    saved = [save(tmp_path, step) for step in (100, 200, 300)]
    flip(saved[1] / "meta.json")
    (saved[2] / "manifest.json").unlink()
    good, passed_over = newest_good(tmp_path)
    assert good == saved[0]
    assert passed_over == [
        (saved[2], "no manifest: the folder was never committed"),
        (saved[1], "meta.json: the contents have changed (SHA-256 differs)"),
    ]


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 99_999_999), save(tmp_path, 100_000_000)
    assert older.name > newer.name  # by name it would be the other way round
    assert newest_good(tmp_path)[0] == newer


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    assert prune(tmp_path, 5) == []
    assert prune(tmp_path, 2) == [saved[1], saved[0]]
    assert {path.name for path in tmp_path.iterdir()} == {saved[2].name, saved[3].name, "latest"}
    with pytest.raises(ValueError, match="at least 1"):
        prune(tmp_path, 0)


def test_prune_never_removes_the_last_good_one(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3)]
    flip(saved[2] / "meta.json")
    assert prune(tmp_path, 1) == []
    flip(saved[1] / "meta.json")
    assert prune(tmp_path, 2) == []
    assert newest_good(tmp_path)[0] == saved[0]


def test_prune_does_not_count_what_is_plainly_broken(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    (saved[3] / "meta.json").unlink()
    (saved[1] / "meta.json").unlink()
    assert prune(tmp_path, 2) == []
    assert prune(tmp_path, 1) == [saved[1], saved[0]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["good", "flipped", "torn"]), min_size=1, max_size=4), st.integers(1, 3))
def test_whatever_is_broken_pruning_leaves_the_newest_good_one(states: list[str], keep: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for step, state in enumerate(states, start=1):
            final = save(root, step)
            if state == "flipped":
                flip(final / "meta.json")
            elif state == "torn":
                (final / "manifest.json").write_bytes(b"{")
        before = newest_good(root)[0]
        prune(root, keep)
        assert newest_good(root)[0] == before


def test_sweep_wants_the_lock(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    final = save(root, 100)
    fill(root / ".tmp-step-00000200", {"a/b": b"half"})
    (root / ".tmp-latest").write_bytes(b"x")
    with lock_directory(tmp_path / "other") as other, pytest.raises(ValueError, match="not in the directory"):
        sweep(root, other)
    with lock_directory(tmp_path) as lock:
        assert [path.name for path in sweep(root, lock)] == [".tmp-latest", ".tmp-step-00000200"]
        assert sweep(tmp_path / "none", lock) == []
    with pytest.raises(ValueError, match="not in the directory"):
        sweep(root, lock)
    assert newest_good(root) == (final, [])


# ------------------------------------------------------------------ full and read-only disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB. Permission bits do not stop root, so a real mount it is."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this container may not mount: " + mounted.stderr.decode().strip())
    yield disk
    # Lazily: torch keeps the file that it could not write open until its error is collected.
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_fills_up_during_a_save(small_disk: Path) -> None:
    good = save(small_disk, 100)
    temporary = begin(small_disk / step_name(200))
    with pytest.raises(CheckpointError) as caught, write_guard(small_disk, temporary, bytes_wanted=3 << 20):
        fill(temporary, {"meta.json": b"{}", "deepspeed/big": b"x" * (2 << 20)})
    message = str(caught.value)
    assert "the disk is full" in message
    assert "3,145,728 bytes" in message
    assert " free" in message
    assert str(temporary / "deepspeed" / "big") in message
    assert f"the last good checkpoint is {good}" in message
    assert not temporary.exists()
    assert newest_good(small_disk) == (good, [])
    again = save(small_disk, 200)  # there is room again
    assert newest_good(small_disk) == (again, [])


def test_torch_and_safetensors_on_a_full_disk_are_recognised(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensor = torch.zeros(1 << 19)  # 2 MiB
    for write in (lambda path: torch.save(tensor, path), lambda path: save_file({"t": tensor}, path)):
        temporary = begin(small_disk / step_name(1))
        guard = write_guard(small_disk, temporary, bytes_wanted=2 << 20)
        with pytest.raises(CheckpointError, match=r"cannot be written.*2,097,152 bytes.*wanted"), guard:
            write(temporary / "weights")
        assert not temporary.exists()


def test_other_errors_pass_the_guard_unchanged(tmp_path: Path) -> None:
    temporary = begin(tmp_path / step_name(1))
    with pytest.raises(RuntimeError, match="shapes differ"), write_guard(tmp_path, temporary):
        raise RuntimeError("shapes differ")
    assert temporary.exists()
    with (
        pytest.raises(CheckpointError, match="quota is used up"),
        write_guard(tmp_path, temporary, remove_folder=False),
    ):
        raise OSError(errno.EDQUOT, "quota")
    assert temporary.exists()


def test_a_disk_that_is_full_when_the_manifest_is_written(small_disk: Path) -> None:
    good = save(small_disk, 100)
    final = small_disk / step_name(200)
    temporary = begin(final)
    fill(temporary)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(b"x" * (2 << 20))
    with pytest.raises(CheckpointError, match="the disk is full") as caught:
        commit(final, temporary, {})
    assert caught.value.where == str(temporary / "manifest.json")
    assert not temporary.exists()
    assert newest_good(small_disk) == (good, [])


def test_ensure_space(small_disk: Path) -> None:
    root = small_disk / "run" / "checkpoints"
    ensure_space(root, 1000)
    assert list(root.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"5,000,000 bytes \(0.00 GiB\) wanted, [0-9,]+ bytes .* free"):
        ensure_space(root, 5_000_000)


def test_a_read_only_disk_is_explained_and_can_still_be_read(small_disk: Path) -> None:
    good = save(small_disk, 100)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for attempt in (lambda: begin(small_disk / step_name(200)), lambda: ensure_space(small_disk, 1)):
        with pytest.raises(CheckpointError, match="read-only") as caught:
            attempt()
        assert f"last good checkpoint is {good}" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"cannot lock .*Read-only"), lock_directory(small_disk):
        pass
    assert newest_good(small_disk) == (good, [])


# ------------------------------------------------------------------ one job per output directory

HOLDER = """
import sys, time
from pathlib import Path
from m3i_scale.scale.checkpoint.commit import lock_directory
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
        with pytest.raises(CheckpointError, match="another job") as caught, lock_directory(tmp_path):
            pass
        assert f"pid {first.pid} on host {socket.gethostname()} since 20" in str(caught.value)
    finally:
        first.kill()
        first.communicate()
    with lock_directory(tmp_path) as lock:
        assert lock.covers(tmp_path / "checkpoints")
    assert not lock.covers(tmp_path)


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
