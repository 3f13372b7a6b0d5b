"""Which checkpoint is taken, kept, swept away."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from checkpoint_files import fill, flip, save
from hypothesis import given, settings
from hypothesis import strategies as st

from m3i_scale.scale.checkpoint.commit import (
    lock_directory,
    newest_good,
    prune,
    sweep,
)


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
