"""What verification finds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_files import FILES, flip, save
from hypothesis import given, settings
from hypothesis import strategies as st

from m3i_scale.checkpoint.manifest import find_errors, read_manifest, verify, write_manifest


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
    assert verify(tmp_path / "nowhere") == ["no manifest: the save was not completed"]
    final = save(tmp_path, 1)
    (final / "link").symlink_to("/etc/passwd")
    assert verify(final) == ["'link' is neither a file nor a directory"]


def test_a_manifest_torn_anywhere_is_found(tmp_path: Path) -> None:
    final = save(tmp_path, 100)
    path = final / "manifest.json"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert verify(final) == ["the manifest is corrupt"], length


def test_a_manifest_of_another_format_is_named(tmp_path: Path) -> None:
    final = save(tmp_path, 100)
    values = json.loads((final / "manifest.json").read_bytes())
    (final / "manifest.json").write_text(json.dumps({**values, "format": 99}))
    assert verify(final) == ["the manifest has format 99, but this version reads 1"]


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


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../b", "./meta.json", "a//b", "", "."])
def test_a_manifest_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    final = save(tmp_path, 1)
    (tmp_path / "outside").write_bytes(b"x")
    written = read_manifest(final).files
    write_manifest(final, {**written, name: written["meta.json"]}, {"step": 1})  # with a checksum that is right
    assert verify(final) == [f"{name}: missing"]


def test_every_fault_names_its_file_and_all_bytes_are_told(tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    told: list[int] = []
    assert find_errors(final, advance=told.append) == []
    assert sum(told) == sum(map(len, FILES.values()))
    for name in FILES:
        path = final / name
        kept = path.read_bytes()
        path.unlink()
        path.symlink_to("/etc/passwd")
        assert [fault.file for fault in find_errors(final)] == [name]
        path.unlink()
        path.write_bytes(kept + b"x")
        assert [fault.file for fault in find_errors(final)] == [name]
        path.write_bytes(kept)
    assert find_errors(final) == []
