"""Files and folders that take their name when they are whole, and what is in a file."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import socket
import stat
from pathlib import Path

import pytest

from m3i_scale.files import atomic_dir, json_text, read_json, replacing, sha256_of, sha256_of_json, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is brought to the disk, by the name that it has at that moment, and renames."""
    seen: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def noted(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix()
        seen.append(name.partition("-")[0].partition("@")[0] + ("/" + name.partition("/")[2] if "/" in name else ""))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *given: seen.append("RENAME") or replace(*given))
    monkeypatch.setattr(Path, "rename", lambda *given: seen.append("RENAME") or rename(*given))
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_its_name(tmp_path: Path, log: list[str]) -> None:
    write_json(tmp_path / "a.json", [1])
    assert log == [".tmp", "RENAME", "."]
    assert names(tmp_path) == ["a.json"]


def test_an_error_leaves_the_file_of_before(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with pytest.raises(TypeError), replacing(tmp_path / "a") as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    with pytest.raises(OSError, match="full") as caught, replacing(tmp_path / "a"):
        raise OSError(28, "full")  # as write(2) does, which names no file
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "none" / "a"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "a")
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "before")


def test_a_file_has_its_mode_from_the_first_byte_on(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        for mode, wanted in ((0o600, 0o600), (0o644, 0o644), (None, 0o600)):
            with replacing(tmp_path / "a", mode=mode) as file:
                assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == wanted
            assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == wanted
    finally:
        os.umask(old)


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, log: list[str]) -> None:
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("x")
        (folder / "link").symlink_to("/etc/passwd")
    assert log == [".out/below/file", ".out/below", ".out", "RENAME", "."]
    assert (names(tmp_path), names(tmp_path / "out")) == (["out"], ["below", "link"])


def test_a_folder_that_can_be_made_anew_does_not_wait_for_the_disk(tmp_path: Path, log: list[str]) -> None:
    with atomic_dir(tmp_path / "out", durable=False) as folder:
        (folder / "file").write_text("x")
    assert log == ["RENAME"]
    assert names(tmp_path / "out") == ["file"]


def test_a_folder_is_replaced_only_where_that_is_meant_and_only_by_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(KeyboardInterrupt), atomic_dir(tmp_path / "out", replace=True):
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="not empty"), atomic_dir(tmp_path / "out") as folder:
        (folder / "new").write_text("x")
    assert (names(tmp_path), names(tmp_path / "out")) == (["out"], ["old"])
    with atomic_dir(tmp_path / "out", replace=True) as folder:
        (folder / "new").write_text("x")
    assert (names(tmp_path), names(tmp_path / "out")) == (["out"], ["new"])


def test_the_hash_of_files_is_that_of_their_contents_in_a_row(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 3_000_000)
    (tmp_path / "b").write_bytes(b"b")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"a" * 3_000_000).hexdigest()
    assert sha256_of(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"a" * 3_000_000 + b"b").hexdigest()
    assert sha256_of_json({"a": 1, "b": 2}) == sha256_of_json({"b": 2, "a": 1}) != sha256_of_json({"a": 1})


def test_json_has_no_numbers_that_json_has_not_and_any_name_of_a_file(tmp_path: Path) -> None:
    value = {"nan": math.nan, "inf": (math.inf, [-math.inf]), "name": "é \udc80"}
    write_json(tmp_path / "a.json", value)
    found = read_json(tmp_path / "a.json")
    assert found == {"nan": "nan", "inf": ["inf", ["-inf"]], "name": "é \udc80"}
    assert math.isnan(float(found["nan"]))
    assert json.loads(json_text(value)) == found
    assert "é" in json_text(value)


def test_what_only_a_living_process_needs_is_not_brought_to_the_disk(tmp_path: Path, log: list[str]) -> None:
    write_json(tmp_path / "a.json", [1], durable=False)
    assert log == ["RENAME"]


def test_an_error_of_something_else_keeps_its_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the input ended"), replacing(tmp_path / "a"):
        raise OSError("the input ended")
    assert names(tmp_path) == []


def test_directories_without_fsync_are_passed_over_and_files_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuses(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or refuses_files:
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    refuses_files = False
    write_json(tmp_path / "a.json", [1])
    refuses_files = True
    with pytest.raises(OSError, match="Invalid argument"):
        write_json(tmp_path / "b.json", [1])
    assert names(tmp_path) == ["a.json"]


def test_what_a_killed_process_left_goes_and_an_output_that_it_had_moved_comes_back(tmp_path: Path) -> None:
    begun = f".out@{socket.gethostname()}.{os.getpid()}"  # the same number: a container that was started again
    (tmp_path / f"{begun}.partial").mkdir()
    (tmp_path / f"{begun}.old").mkdir()
    (tmp_path / f"{begun}.old" / "file").write_text("of before")
    with pytest.raises(ValueError, match="half-way"), atomic_dir(tmp_path / "out", replace=True):
        raise ValueError("half-way")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "of before"
