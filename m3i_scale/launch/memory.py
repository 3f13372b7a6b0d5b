"""How much memory a rank may fill on this host, as an agent tells it. Neither torch nor DeepSpeed is imported."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from m3i_scale.launch.doctor.machine import look
from m3i_scale.text import GIB

_ASK = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_ASK_S = 10.0
_OTHER_DEVICES = ("kfd", "accel*", "accel/accel*", "davinci*", "hl*")
"""In /dev, of accelerators that `nvidia-smi` does not know: AMD's, Google's and Intel's, Ascend's, Gaudi's."""


@dataclass(frozen=True)
class RankMemory:
    """Of one rank."""

    gib: float | None
    """None: this host has accelerators whose memory is not known."""
    on_host: bool
    """Whether it is the host's own memory, shared out among its ranks."""


def rank_memory(slots: int, *, on_host: bool, devices: Path = Path("/dev")) -> RankMemory:
    """Return the memory that a rank has.

    Args:
        slots: ranks on this host.
        on_host: they compute on CPUs, whatever else the host has.
        devices: where the kernel shows accelerators.
    """
    sizes = [] if on_host else _of_nvidia()
    if sizes:
        return RankMemory(min(sizes), on_host=False)
    if not on_host and any(any(devices.glob(pattern)) for pattern in ("nvidia[0-9]*", *_OTHER_DEVICES)):
        return RankMemory(None, on_host=False)
    return RankMemory(look().memory_available / GIB / slots, on_host=True)


def _of_nvidia() -> list[float]:
    try:
        said = subprocess.run(_ASK, capture_output=True, text=True, timeout=_ASK_S, check=True).stdout
        return [float(line) / 1024 for line in said.split("\n") if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError):  # no such program, or its driver does not answer
        return []
