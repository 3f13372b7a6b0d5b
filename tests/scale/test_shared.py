"""Two ranks that write to one folder, or do not."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from launch import TESTS, start_ranks


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("places")
    job = start_ranks([str(TESTS / "scale" / "shared_case.py"), str(root)], 2, root / "logs")
    assert job.wait() == [0, 0], job.text()
    return root


def told(places: Path, case: str) -> str | None:
    both = [json.loads((places / f"{case}-{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1]
    return both[0]


def test_one_folder_is_shared_and_kept_clean(places: Path):
    assert told(places, "same") is None
    assert list((places / "same" / "both").iterdir()) == []


def test_two_folders_end_all_ranks_with_the_host_that_is_apart(places: Path):
    said = told(places, "apart")
    assert said is not None
    assert f"rank 1 on {socket.gethostname()} does not see what rank 0 wrote" in said
    assert "rank 0 on" not in said.splitlines()[0]
    assert "where: " in said
    assert "why: every rank writes its part" in said
    assert "fix: set output_dir to a folder of a file system that all hosts" in said
    assert list((places / "apart").glob("*/*")) == []


def test_what_cannot_be_written_to_is_said_at_once(places: Path):
    said = told(places, "no_folder")
    assert said is not None
    assert "cannot write there (Not a directory)" in said
