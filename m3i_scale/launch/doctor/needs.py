"""What a run needs of a host, in numbers; made by `run/preflight.py`, sent to every host."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Needs:
    """Of one host, with all ranks on it. Zero: nothing is known to be needed."""

    ranks: int = 1
    """On the host."""
    world_size: int = 1
    checkpoint_bytes: int = 0
    """Of one checkpoint, all ranks together."""
    kept_checkpoints: int = 0
    """That lie on the disk at the same time at most, the one being written included."""
    kept_bytes: int = 0
    """Of these."""
    memory_bytes: int = 0
    """In host memory in any case: what is offloaded, and the copies that checkpoints are written from."""
    state_bytes: int = 0
    """On devices: weights, moments, averages. In host memory where hosts compute."""
    shm_bytes: int = 0
    """In /dev/shm: what loader processes have ready."""
    open_files: int = 0
    """Of one rank."""

    def to_json(self) -> dict[str, Any]:
        """For a request."""
        return asdict(self)
