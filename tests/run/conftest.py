"""Shards that all tests of this room train on, and one plain run of two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from saved_runs import Done, call, make_calls, make_run
from shapes import make_shapes


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def foreground(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A run on two ranks under ZeRO-3, with checkpoints of steps 2, 4 and 6. Nobody writes into its folder."""
    root = tmp_path_factory.mktemp("foreground")
    folder = make_run(root / "run", shards)
    calls = {"foreground": call(folder, "checkpoint.background=false", faults=[])}
    done = make_calls(calls, {"foreground": folder}, root / "results")["foreground"]
    assert done.codes == [0, 0], done.texts
    return done
