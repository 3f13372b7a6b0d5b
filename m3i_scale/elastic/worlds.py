"""Check whether a run fits its hosts, and choose the hosts of the largest world that it fits.

Ranks divide streams and batch evenly. Contrastive losses over the global micro-batch keep their batch size: fewer ranks
get a larger micro-batch, as long as they do not run out of memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from m3i_scale.config import RunConfig
from m3i_scale.data.mixing import check_shares, check_weights
from m3i_scale.data.remote.access import to_address
from m3i_scale.engine.deepspeed.resolve import check_batch
from m3i_scale.errors import ConfigError, ErrorCollector
from m3i_scale.host.failures import Failure
from m3i_scale.host.output_dir import check_output_dir
from m3i_scale.launch.hosts import Host
from m3i_scale.launch.job import Job
from m3i_scale.objective.recipe import parse_recipe

_OUT_OF_MEMORY = re.compile(r"out of memory|SIGKILL", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """The hosts of an attempt."""

    hosts: tuple[Host, ...]
    micro_batch_size: int
    """Per rank."""

    @property
    def ranks(self) -> int:
        """Return the number of ranks on all hosts."""
        return sum(host.slots for host in self.hosts)

    @property
    def compared(self) -> int:
        """Return the size of the global micro-batch, over which contrastive losses compare samples."""
        return self.ranks * self.micro_batch_size

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the hosts."""
        return tuple(host.name for host in self.hosts)


def micro_batch_for(run: RunConfig, ranks: int) -> int | None:
    """Return the micro-batch size per rank for a number of ranks: the configured one if it fits, else the largest
    smaller one that fits, else the smallest larger one; None if none fits."""
    configured = run.optim.micro_batch_size
    above = range(configured + 1, run.optim.batch_size // ranks + 1)
    return next((size for size in [*range(configured, 0, -1), *above] if _fits(run, ranks, size)), None)


def _fits(run: RunConfig, ranks: int, micro_batch_size: int) -> bool:
    sizes = [micro_batch_size, *(stage.micro_batch_size for stage in run.stages if stage.micro_batch_size is not None)]
    if any(run.optim.batch_size % (size * ranks) for size in sizes):
        return False
    try:
        for size in sizes:
            check_shares(run.data, micro_batch_size=size, world_size=ranks)
    except ConfigError:
        return False
    return True


def largest_world(run: RunConfig, hosts: Sequence[Host], fewest: int) -> World | None:
    """Return the world with the most ranks on at least `fewest` hosts, preferring the first ones; None if none fits."""
    for count in range(len(hosts), max(fewest, 1) - 1, -1):
        chosen = tuple(hosts[:count])
        size = micro_batch_for(run, sum(host.slots for host in chosen))
        if size is not None:
            return World(chosen, size)
    return None


class ComparedSamples:
    """The global contrastive batch size, preserved across attempts. A launch starts with at least `fewest` hosts."""

    def __init__(self, run: RunConfig, hosts: Sequence[Host], fewest: int) -> None:
        depends = run.optim.contrastive_batch == "micro" and parse_recipe(run.recipe).compares_samples
        largest = largest_world(run, hosts, fewest) if depends else None
        self.usual = None if largest is None else largest.compared
        """Global contrastive batch with all hosts; None if the recipe has no contrastive loss, if the batch does not
        depend on the micro-batch, or if no number of hosts fits the run."""
        self._ran_out = False
        self._raised = False

    def keep(self, world: World) -> tuple[World, str | None]:
        """Return the same hosts with the micro-batch that preserves the global contrastive batch, unless ranks ran out
        of memory with it. Also return a message for the user if that batch is smaller than before."""
        self._raised = False
        if self.usual in (None, world.compared):
            return world, None
        size, rest = divmod(self.usual or 0, world.ranks)
        if rest:
            why = f"{world.ranks} ranks do not divide that"
        elif size > world.micro_batch_size and self._ran_out:
            why = f"ranks were killed or ran out of memory with a micro-batch of {size}"
        else:
            self._raised = size > world.micro_batch_size
            return replace(world, micro_batch_size=size), None
        return world, f"the global contrastive batch is {world.compared}, was {self.usual}: {why}"

    def note(self, cause: Failure | None) -> bool:
        """Record a failed attempt; return whether it ran out of memory with an increased micro-batch, which is then
        never increased again."""
        out_of_memory = cause is not None and _OUT_OF_MEMORY.search(cause.message) is not None
        self._ran_out = self._ran_out or (self._raised and out_of_memory)
        return self._raised and out_of_memory


def check_fit(run: RunConfig, job: Job, launcher: str) -> None:
    """Validate data and ranks against each other, without reading data. `elastic` chooses the hosts and micro-batch."""
    check_output_dir(job.output_dir)
    check_weights(run.data.datasets)
    for name, source in run.data.datasets.items():
        to_address(source.path, f"data.datasets.{name}.path")
    if launcher == "elastic":
        return
    size = run.optim.micro_batch_size
    errors = ErrorCollector()
    errors.collect(check_batch, job.world_size, run.optim.batch_size, size)
    errors.collect(lambda: check_shares(run.data, micro_batch_size=size, world_size=job.world_size))
    errors.raise_any()
