"""What the attempts of a launch have shown of its hosts: which come first, are not waited for, or are left out."""

from __future__ import annotations

from collections.abc import Sequence

from m3i_scale.launch.hosts import Host
from m3i_scale.launch.supervise import Outcome
from m3i_scale.launch.worlds import World

FAILS = "its ranks were the first to fail, twice running"


class HostHistory:
    """Hosts from attempt to attempt.

    Args:
        hosts: in the order in which they were named.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._named = tuple(hosts)
        self.order = self._named
        """Those first that have just worked, those last that are not to be relied on."""
        self.without_answer: set[str] = set()
        """Names of those that were lost, or did not answer when they were last asked."""
        self.failing: set[str] = set()
        """Names of those that were the first cause of two failures running. They answer, and it is no use."""
        self._blamed: str | None = None

    def unresponsive(self, fewest: int) -> frozenset[str]:
        """Return the names of hosts that nobody has to wait for: where the others are enough."""
        return frozenset(self.without_answer) if len(self.order) - len(self.without_answer) >= fewest else frozenset()

    def answered(self, reasons: dict[str, str]) -> None:
        """Note who has answered, once all have been asked.

        Args:
            reasons: why a host cannot be used, by name.
        """
        self.without_answer = set(reasons)

    def ended(self, world: World, outcome: Outcome) -> None:
        """Note how an attempt has ended."""
        self.without_answer |= set(outcome.lost)
        cause = outcome.cause if outcome.status == "failed" else None
        # One that was lost is another matter: it may be back for good.
        blamed = cause.host if cause is not None and cause.kind != "host" and not cause.consequence else None
        if blamed is not None and blamed == self._blamed:
            self.failing.add(blamed)
        self._blamed = blamed
        last = [host for host in self._named if host.name in self.failing or host.name in outcome.lost]
        rest = [host for host in self._named if host not in last]
        worked = [host for host in rest if host in world.hosts]
        self.order = (*worked, *[host for host in rest if host not in worked], *last)
