"""All cases run once a session, in a world of one rank and in a world of two, at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import TESTS, Job, start_ranks
from tiny import tiny_teacher


class Worlds:
    """Results of the cases by number of ranks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: dict[int, Job] = {}
        tiny_teacher()  # one for all ranks
        for world in (1, 2):
            (root / str(world)).mkdir()
            arguments = [str(TESTS / "distributed" / "cases.py"), str(root / str(world))]
            self.jobs[world] = start_ranks(arguments, world, root / f"logs-{world}")
        self.codes = {world: job.wait(1800) for world, job in self.jobs.items()}

    def result(self, case: str, world: int, rank: int = 0) -> Any:
        path = self.root / str(world) / f"{case}-rank{rank}.pt"
        if not path.exists():
            faults = [file.read_text() for file in (self.root / str(world)).glob("failed-*.txt")]
            pytest.fail(
                f"no result of '{case}' with {world} ranks (exit codes {self.codes[world]})\n" + "\n".join(faults)
            )
        return torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(tmp_path_factory.mktemp("worlds"))
