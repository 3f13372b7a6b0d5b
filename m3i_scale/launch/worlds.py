"""Which hosts make a world that the run fits: ranks share out streams and batch evenly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from m3i_scale.config import RunConfig
from m3i_scale.data.mixing import check_shares
from m3i_scale.errors import ConfigError
from m3i_scale.launch.hosts import Host


@dataclass(frozen=True)
class World:
    """Hosts of an attempt."""

    hosts: tuple[Host, ...]
    micro_batch_size: int
    """Per rank."""

    @property
    def ranks(self) -> int:
        """Of all hosts."""
        return sum(host.slots for host in self.hosts)

    @property
    def compared(self) -> int:
        """Return samples of a micro-batch over all ranks, which some losses compare with each other."""
        return self.ranks * self.micro_batch_size

    @property
    def names(self) -> tuple[str, ...]:
        """Of the hosts."""
        return tuple(host.name for host in self.hosts)


def micro_batch_for(run: RunConfig, ranks: int) -> int | None:
    """Samples per rank in one forward pass, in a world of that many ranks: the run file's where they fit, else the
    largest number below that does, else the smallest above; None where no number does."""
    wanted = run.optim.micro_batch_size
    above = range(wanted + 1, run.optim.batch_size // ranks + 1)
    return next((size for size in [*range(wanted, 0, -1), *above] if _fits(run, ranks, size)), None)


def _fits(run: RunConfig, ranks: int, micro_batch_size: int) -> bool:
    if run.optim.batch_size % (micro_batch_size * ranks):
        return False
    try:
        check_shares(run.data, micro_batch_size=micro_batch_size, world_size=ranks)
    except ConfigError:
        return False
    return True


def largest_world(run: RunConfig, hosts: Sequence[Host], fewest: int) -> World | None:
    """The one with the most ranks, the first hosts first.

    Args:
        run: to be shared out.
        hosts: that answer, those to be kept first.
        fewest: hosts that must remain.

    Returns:
        None where no number of these hosts fits.
    """
    fitting = list(_worlds(run, hosts, fewest))
    return max(fitting, key=lambda world: world.ranks, default=None)


def _worlds(run: RunConfig, hosts: Sequence[Host], fewest: int) -> Iterator[World]:
    for count in range(len(hosts), max(fewest, 1) - 1, -1):
        chosen = tuple(hosts[:count])
        size = micro_batch_for(run, sum(host.slots for host in chosen))
        if size is not None:
            yield World(chosen, size)
