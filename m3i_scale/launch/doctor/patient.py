"""What is examined: hosts, how they are reached, and the run that they are to be fit for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from m3i_scale.launch.doctor.channel import Way
from m3i_scale.launch.doctor.needs import Needs


@dataclass(frozen=True)
class Patient:
    """Hosts, and a run or none."""

    slots: Mapping[str, int]
    """Ranks by host, the head first."""
    way: Way
    port: int
    """Of the head, where rank 0 will wait."""
    interface: str | None = None
    master_address: str | None = None
    run: str | None = None
    overrides: tuple[str, ...] = ()
    needs: Mapping[str, Needs] | None = None
    """By host, where there is a run."""

    @property
    def hosts(self) -> list[str]:
        """The head first."""
        return list(self.slots)

    @property
    def head(self) -> str:
        """Where rank 0 will run."""
        return self.hosts[0]
