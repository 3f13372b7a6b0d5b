"""Shards that all tests of this room train on."""

from __future__ import annotations

from pathlib import Path

import pytest
from shapes import make_shapes


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))
