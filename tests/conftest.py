"""For all tests: one thread, repeatable random numbers, no time limits on single examples, long files first."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "300")  # ten seconds are few for a test's server on a busy machine
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "300")
# transformers copies the code of a model there, file by file: another process may read half a file.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="m3i-modules-")

import pytest
import torch
from forked import Forks
from hypothesis import HealthCheck, settings

from m3i_scale.output import release_stdout

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
settings.register_profile(
    "shared_machine",
    deadline=None,
    max_examples=50,
    derandomize="CI" in os.environ,  # new examples are drawn where somebody can look at what they find
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("shared_machine")
LONGEST = ("test_docs.py", "test_worlds.py", "test_resume.py", "test_simulated_runs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take minutes, so that no worker waits for one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The command line, without its imports."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(autouse=True)
def nobody_keeps_stdout() -> Iterator[None]:
    """A command that ran in this process may have reserved it for its document."""
    yield
    release_stdout()
