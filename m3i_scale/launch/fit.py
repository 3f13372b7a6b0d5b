"""Whether a run can begin where it is launched: what every rank would refuse, told before a scheduler queues for it."""

from __future__ import annotations

from m3i_scale.config import RunConfig
from m3i_scale.data.mixing import check_shares, check_weights
from m3i_scale.data.remote.address import to_place
from m3i_scale.errors import Faults
from m3i_scale.launch.compared import check_least
from m3i_scale.launch.hosts import Host
from m3i_scale.launch.job import Job
from m3i_scale.scale.deepspeed.resolve import check_batch


def check_fit(run: RunConfig, job: Job, launcher: str) -> None:
    """Check data and ranks against each other, without reading any data.

    Args:
        run: overrides applied.
        job: with the number of ranks.
        launcher: `elastic` finds the hosts and the micro-batch that fit by itself.

    Raises:
        ConfigError: no data, a batch or streams that ranks cannot share out, or more compared samples than they have.
        DataError: an address of shards that no rank would read.
    """
    check_weights(run.data.sources)
    for name, source in run.data.sources.items():
        to_place(source.shards, f"data.sources.{name}.shards")
    if launcher == "elastic":
        hosts = job.hosts or (Host("localhost", job.ranks_per_node),)
        check_least(run, job.cluster.min_compared, hosts, job.cluster.min_nodes or len(hosts))
        return
    size = run.optim.micro_batch_size
    faults = Faults()
    faults.note(check_batch, job.world_size, run.optim.batch_size, size)
    faults.note(lambda: check_shares(run.data, micro_batch_size=size, world_size=job.world_size))
    faults.end()
