"""Check whether a run fits its hosts, and choose the hosts of the largest world that it fits.

Ranks divide streams and batch evenly. Contrastive losses over the global micro-batch keep their batch size if memory
allows a larger micro-batch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from m3i_scale.config import RunConfig
from m3i_scale.data.mixing import check_shares, check_weights
from m3i_scale.data.remote.address import to_address
from m3i_scale.errors import ConfigError, Faults
from m3i_scale.launch.doctor.machine import RankMemory
from m3i_scale.launch.failures import Failure
from m3i_scale.launch.hosts import Host
from m3i_scale.launch.job import Job
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.scale.deepspeed.resolve import check_batch
from m3i_scale.scale.output_dir import check_output_dir

PLAN_S = 600.0
"""Time limit of `plan`."""
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
    wanted = run.optim.micro_batch_size
    above = range(wanted + 1, run.optim.batch_size // ranks + 1)
    return next((size for size in [*range(wanted, 0, -1), *above] if _fits(run, ranks, size)), None)


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
    """Return the world with the most ranks, preferring the first hosts; None if no number of these hosts fits.

    Args:
        run: the run to distribute.
        hosts: responding hosts, preferred ones first.
        fewest: minimum number of hosts.
    """
    return max(_worlds(run, hosts, fewest), key=lambda world: world.ranks, default=None)


def _worlds(run: RunConfig, hosts: Sequence[Host], fewest: int) -> Iterator[World]:
    for count in range(len(hosts), max(fewest, 1) - 1, -1):
        chosen = tuple(hosts[:count])
        size = micro_batch_for(run, sum(host.slots for host in chosen))
        if size is not None:
            yield World(chosen, size)


class ComparedSamples:
    """The global contrastive batch size, preserved from attempt to attempt.

    Args:
        run: the launched run.
        hosts: all of them, as they were named.
        fewest: minimum number of hosts to start with.
    """

    def __init__(self, run: RunConfig, hosts: Sequence[Host], fewest: int) -> None:
        whole = largest_world(run, hosts, fewest) if parse_recipe(run.recipe).compares_samples else None
        self.usual = None if whole is None else whole.compared
        """Global contrastive batch with all hosts; None if the recipe has no contrastive loss, or no number of hosts
        fits the run."""
        self._ran_out = False
        self._raised = False

    def keep(self, world: World, refusal: Callable[[World], str | None]) -> tuple[World, str | None]:
        """Return the same hosts with the micro-batch that preserves the global contrastive batch, if memory allows.
        Also return a message for the user if that batch is smaller than before.

        Args:
            world: world of the next attempt.
            refusal: returns why a world's micro-batch does not fit into the memory of its ranks; None: it fits.
        """
        self._raised = False
        if self.usual in (None, world.compared):
            return world, None
        size, rest = divmod(self.usual or 0, world.ranks)
        wanted = replace(world, micro_batch_size=size)
        why = f"{world.ranks} ranks do not divide that" if rest else None
        if why is None and size > world.micro_batch_size:
            why = "ranks ran out of memory" if self._ran_out else refusal(wanted)
            self._raised = why is None
        if why is None:
            return wanted, None
        return world, f"losses compare {world.compared} samples at a time, were {self.usual}: {why}"

    def note(self, cause: Failure | None) -> None:
        """Record a failed attempt: if it ran out of memory with an increased micro-batch, never increase it again."""
        if self._raised and cause is not None and _OUT_OF_MEMORY.search(cause.message):
            self._ran_out = True


def check_least(run: RunConfig, least: int | None, hosts: Sequence[Host], fewest: int) -> None:
    """Raise ConfigError if `min_compared` has no effect, or exceeds the value with all hosts."""
    if least is None:
        return
    usual = ComparedSamples(run, hosts, fewest).usual
    if usual is None and not parse_recipe(run.recipe).compares_samples:
        raise ConfigError(
            "min_compared has no effect: no loss of this recipe compares samples",
            where=f"min_compared: {least}",
            fix="leave it out",
        )
    if usual is not None and usual < least:
        raise ConfigError(
            f"losses compare {usual} samples at a time on all hosts",
            where=f"min_compared: {least}",
            fix="lower it, or raise optim.micro_batch_size (that × ranks are compared)",
        )


def check_fit(run: RunConfig, job: Job, launcher: str) -> None:
    """Validate data and ranks against each other, without reading any data.

    Args:
        run: overrides applied.
        job: the launch, with its number of ranks.
        launcher: `elastic` chooses fitting hosts and micro-batch itself.
    """
    check_output_dir(job.output_dir)
    check_weights(run.data.datasets)
    for name, source in run.data.datasets.items():
        to_address(source.path, f"data.datasets.{name}.path")
    if launcher == "elastic":
        hosts = job.hosts or (Host("localhost", job.ranks_per_node),)
        check_least(run, job.cluster.min_compared, hosts, job.cluster.min_nodes or len(hosts))
        return
    size = run.optim.micro_batch_size
    faults = Faults()
    faults.note(check_batch, job.world_size, run.optim.batch_size, size)
    faults.note(lambda: check_shares(run.data, micro_batch_size=size, world_size=job.world_size))
    faults.end()


def refusal_of_plan(
    words: Sequence[str], world: World, memory: RankMemory, meanwhile: Callable[[], bool], given_gib: float | None
) -> str | None:
    """Return why a world's micro-batch does not fit into the ranks' memory, according to `m3i-scale plan`; None if it
    fits.

    Args:
        words: config file and overrides, as passed to `train`.
        world: the world with that micro-batch.
        memory: memory of the rank with the least.
        meanwhile: called while `plan` works; False aborts it.
        given_gib: memory per rank from the description; None if not given.
    """
    wanted = f"a micro-batch of {world.micro_batch_size}"
    gib = memory.gib if given_gib is None else given_gib
    if gib is None:
        return f"whether {wanted} has room is not known (--memory-gib says what a rank has)"
    slots = {host.slots for host in world.hosts}
    nodes, per_node = (len(world.hosts), slots.pop()) if len(slots) == 1 else (world.ranks, 1)
    command = [sys.executable, "-m", "m3i_scale", "plan", *words, f"optim.micro_batch_size={world.micro_batch_size}"]
    command += ["--nodes", str(nodes), "--ranks-per-node", str(per_node), "--memory-gib", f"{gib:.3f}"]
    command += ["--hardware", "cpu" if memory.on_host else "h100", "--json"]
    code, output, errors = _run(command, meanwhile)
    try:
        document = json.loads(output)
        peak_gib, fits = float(document["peak_gib_per_rank"]), bool(document["fits"])
    except (ValueError, KeyError, TypeError):
        reason = next((line for line in errors.splitlines() if line.startswith("error: ")), f"exit code {code}")
        return f"whether {wanted} has room could not be planned ({reason.removeprefix('error: ')})"
    return None if fits else f"{wanted} takes {peak_gib:.3g} GiB of a rank, which has {gib:.3g} (see `plan`)"


def _run(command: Sequence[str], meanwhile: Callable[[], bool]) -> tuple[int | None, str, str]:
    process = subprocess.Popen(
        command,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},  # it computes nothing
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + PLAN_S
    while meanwhile() and time.monotonic() < deadline:
        try:
            output, errors = process.communicate(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
        return process.returncode, output, errors
    process.kill()
    process.communicate()
    return None, "", "error: it took too long"
