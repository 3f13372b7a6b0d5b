"""Directories that commit, and a kill at every point of a save."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FILES, fill, flip, save

from m3i_scale.checkpoint.commit import begin, commit, discard, sweep
from m3i_scale.checkpoint.layout import checkpoints, step_name, step_of, temporary_for
from m3i_scale.checkpoint.manifest import digest_files, newest_good, read_manifest, verify
from m3i_scale.errors import CheckpointError
from m3i_scale.files import sha256_of
from m3i_scale.host.output_dir import lock_directory

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
    assert [line.rpartition("-")[0] or line for line in after] == [".", ".tmp-latest", "LATEST", "."]


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
        "m3i_scale.checkpoint.manifest.sha256_of", lambda path: read.append(path.name) or sha256_of(path)
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
    with pytest.raises(CheckpointError) as caught:
        commit(final, temporary, {}, digests=digests)
    assert caught.value.where == str(temporary / "meta.json")
    (temporary / "meta.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        commit(final, temporary, {}, digests=digests)
    assert caught.value.where == str(temporary)
    assert newest_good(tmp_path) == (None, [])


def test_a_link_is_refused(tmp_path: Path) -> None:
    temporary = begin(tmp_path / step_name(1))
    (temporary / "secret").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError) as caught:
        commit(tmp_path / step_name(1), temporary, {})
    assert caught.value.where == str(temporary / "secret")
    (temporary / "secret").unlink()
    (temporary / "folder").symlink_to("/etc")
    with pytest.raises(CheckpointError) as caught:
        commit(tmp_path / step_name(1), temporary, {})
    assert caught.value.where == str(temporary / "folder")


def test_a_good_checkpoint_is_never_written_over_and_a_broken_one_is_replaced(tmp_path: Path) -> None:
    final = save(tmp_path, 100)
    with pytest.raises(CheckpointError) as caught:
        begin(final)
    assert caught.value.where == str(final)
    leftover = temporary_for(final)
    leftover.mkdir()
    with pytest.raises(CheckpointError) as caught:
        commit(final, leftover, {})
    assert caught.value.where == str(final)
    flip(final / "meta.json")
    save(tmp_path, 100)
    assert newest_good(tmp_path) == (final, [])
    assert list(tmp_path.glob(".tmp-*")) == []


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over_and_its_name_is_free(tmp_path: Path) -> None:
    good = save(tmp_path, 100)
    shutil.copytree(good, tmp_path / step_name(200))
    newest, passed_over = newest_good(tmp_path)
    assert newest == good
    assert [path for path, _ in passed_over] == [tmp_path / step_name(200)]
    assert newest_good(tmp_path, contents=False)[0] == good
    again = save(tmp_path, 200)  # the run trains on, and saves under that name
    assert newest_good(tmp_path) == (again, [])
    shutil.copytree(good, tmp_path / "kept")  # a name of one's own says nothing of a step
    assert verify(tmp_path / "kept") == []


def test_sweep_removes_what_a_killed_job_left(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    final = save(root, 100)
    fill(root / ".tmp-step-00000200", {"a/b": b"half"})
    (root / ".tmp-latest").write_bytes(b"x")
    assert [path.name for path in sweep(root)] == [".tmp-latest", ".tmp-step-00000200"]
    assert sweep(tmp_path / "none") == []
    assert newest_good(root) == (final, [])


def test_files_that_nfs_keeps_for_a_reader_end_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are renamed to `.nfsXXXX` in their folder, which can then not be removed."""
    final, rmdir = save(tmp_path, 100), os.rmdir

    def busy(path: str | Path, **more: Any) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    monkeypatch.setattr(os, "rmdir", busy)
    discard(final)
    discard(save(tmp_path, 100))  # the same step again
    assert checkpoints(tmp_path) == []
    assert sweep(tmp_path) == []
    assert len(list(tmp_path.glob(".tmp-removed-*"))) == 2
    monkeypatch.setattr(os, "rmdir", rmdir)
    discard(save(tmp_path, 200))
    assert list(tmp_path.glob(".tmp-removed-*")) == []


def test_begin_starts_from_an_empty_folder(tmp_path: Path) -> None:
    left = temporary_for(tmp_path / step_name(100))
    fill(left, {"half": b"written"})
    assert list(begin(tmp_path / step_name(100)).iterdir()) == []


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
from m3i_scale.checkpoint.commit import begin, commit
from m3i_scale.checkpoint.layout import step_name
from m3i_scale.config import RetentionConfig
from m3i_scale.checkpoint.retention import prune
from m3i_scale.host.output_dir import lock_directory

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
        prune(root, RetentionConfig(keep_latest=1), committed=final)

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
        assert all(verify(path) == [] for path in checkpoints(root)), number
        assert verify(root / (root / "latest").read_text().strip()) == [], number
        seen.add((good.name, temporary_for(root / step_name(200)).exists()))
        with lock_directory(root.parent):  # the kernel has let go of the killed job's lock
            sweep(root)
            assert not list(root.glob(".tmp-*")), number
            if good.name == old.name:
                save(root, 200)
        assert newest_good(root) == (root / step_name(200), [])
    # Both sides of the commit were hit: nothing written yet, half written, committed.
    assert seen == {("step-00000100", False), ("step-00000100", True), ("step-00000200", False)}
