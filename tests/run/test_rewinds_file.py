"""Which checkpoint a run goes back to, what it withdraws, and what a restart finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m3i_scale.checkpoint.commit import begin, commit
from m3i_scale.checkpoint.layout import checkpoints, step_name, step_of
from m3i_scale.errors import CheckpointError
from m3i_scale.run.spike import REWINDS, finish_rewind, newest_before, read_rewinds


def save(root: Path, *steps: int, rewinds: int = 0) -> None:
    for step in steps:
        final = root / step_name(step)
        temporary = begin(final)
        (temporary / "meta.json").write_text(json.dumps({"step": step, "rewinds": rewinds}))
        commit(final, temporary, {"step": step})


def steps(root: Path) -> list[int | None]:
    return [step_of(path) for path in checkpoints(root)]


def note(folder: Path, *targets: int) -> None:
    (folder / REWINDS).write_text(json.dumps([{"rewound_to": target, "data": [{}]} for target in targets]))


def test_it_goes_back_to_the_newest_checkpoint_before_that_verifies(tmp_path: Path) -> None:
    save(tmp_path, 100, 200, 300)
    assert newest_before(tmp_path, 301) == tmp_path / step_name(300)
    assert newest_before(tmp_path, 300) == tmp_path / step_name(200)
    (tmp_path / step_name(200) / "meta.json").write_text("torn")
    assert newest_before(tmp_path, 300) == tmp_path / step_name(100)
    assert newest_before(tmp_path, 100) is None


def test_what_the_last_rewind_has_undone_is_withdrawn_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 100, 200, 300)
    finish_rewind(tmp_path)
    assert steps(root) == [300, 200, 100]
    note(tmp_path, 100)
    finish_rewind(tmp_path)
    assert steps(root) == [100]
    assert (root / "latest").read_text() == "step-00000100\n"
    save(root, 200, 300, rewinds=1)
    finish_rewind(tmp_path)
    assert steps(root) == [300, 200, 100]
    note(tmp_path, 100, 200)
    finish_rewind(tmp_path)
    assert steps(root) == [200, 100]


def test_a_damaged_checkpoint_stays_for_whoever_looks_into_it(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 100, 200)
    (root / step_name(200) / "meta.json").write_text("torn")
    note(tmp_path, 100)
    finish_rewind(tmp_path)
    assert steps(root) == [200, 100]


@pytest.mark.parametrize("text", ["", "{}1", "{}", "[{}]", "[1]", '[{"rewound_to": "x", "data": []}]'])
def test_a_file_that_cannot_be_read_is_explained(text: str, tmp_path: Path) -> None:
    assert read_rewinds(tmp_path / REWINDS) == []
    (tmp_path / REWINDS).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_rewinds(tmp_path / REWINDS)
    assert str(caught.value.where).endswith("/rewinds.json")
    assert "\n" not in caught.value.what
