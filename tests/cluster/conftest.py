"""Two hosts for all tests of this room, made once; each test finds them up, whole and idle. Shards to train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Hosts, unavailable
from shapes import make_shapes


@pytest.fixture(scope="session")
def two_hosts() -> Iterator[Hosts]:
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    with Hosts(2) as hosts:
        yield hosts


@pytest.fixture
def hosts(two_hosts: Hosts) -> Iterator[Hosts]:
    yield two_hosts
    two_hosts.reset()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))
