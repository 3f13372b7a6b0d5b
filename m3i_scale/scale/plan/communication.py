"""Count bytes and time of communication: NCCL rings over consecutive ranks, and gloo's rings."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field

AVERAGED = "gather for the EMA teacher"
"""Gather of a group of EMA weights in the compute dtype, under stages 1 and 2."""
AFTER_BACKWARD = ("update", "all-reduce of the step")
"""Traffic that waits for the end of the backward pass."""
ONCE_A_STEP = (*AFTER_BACKWARD, AVERAGED)
"""Traffic that does not grow with the number of micro-batches."""
IN_GROUP = "gather in the group"
"""Gathers from second copies of the shards (`zero_hpz_partition_size`)."""
FETCH = "fetch by all-reduce"
"""Replaces a gather under `stage3_use_all_reduce_for_fetch_params`."""
_PASSES = {"all-reduce": 2, "all-reduce of the step": 2, FETCH: 2}
"""Passes of the data over a ring: an all-reduce is a reduce-scatter and an all-gather."""


@dataclass(frozen=True)
class Protocol:
    """An NCCL protocol, with the numbers of NCCL's tuner (`src/graph/tuning.cc` at b647562, NVLink within a node).
    Latencies are in µs."""

    ring_us: float
    """Base latency of a ring collective, independent of the number of steps."""
    ring_intra_us: float
    """Latency of a ring step within a node; below, of a step to another node."""
    ring_inter_us: float
    tree_us: float
    tree_intra_us: float
    tree_inter_us: float
    overhead_us: float
    """Minimum latency of a step within a node if the ring leaves the node: posting to the network."""
    share: float
    """Usable fraction of the bandwidth; the rest is flags."""
    tree_share: float
    most_gb_s: tuple[float, float, float] = (math.inf, math.inf, math.inf)
    """Maximum bandwidth of a ring in one node, over two nodes, and over more."""


PROTOCOLS = (
    Protocol(6.6, 0.6, 2.7, 6.8, 0.6, 5.0, 1.0, 1 / 4, 0.92 / 3.8, (87.7, 22.5, 19.0)),  # LL: for small tensors
    Protocol(14.0, 1.9, 4.0, 14.0, 1.25, 8.5, 1.0, 0.92, 0.92 * 0.92),  # LL128
    Protocol(8.4, 3.4, 14.0, 0.0, 28.0, 28.0, 3.0, 1.0, 0.92),  # Simple: for large ones
)


@dataclass
class Traffic:
    """Collectives counted by kind and size: the size is the bytes of the full tensors."""

    sizes: defaultdict[str, Counter[float]] = field(default_factory=lambda: defaultdict(Counter))
    pieces: int = 0
    """Shards that DeepSpeed splits or joins one by one: one per rank and parameter."""

    def add(self, kind: str, size: float, calls: int = 1) -> None:
        """Count `calls` collectives with `size` bytes in total."""
        if size:
            self.sizes[kind][size / calls] += calls

    def __add__(self, other: Traffic) -> Traffic:
        total = Traffic()
        for traffic in (self, other):
            for kind, sizes in traffic.sizes.items():
                total.sizes[kind] += sizes
            total.pieces += traffic.pieces
        return total

    @property
    def bytes(self) -> dict[str, int]:
        """Return bytes by kind."""
        return {kind: round(sum(size * n for size, n in sizes.items())) for kind, sizes in self.sizes.items()}

    @property
    def calls(self) -> dict[str, int]:
        """Return calls by kind."""
        return {kind: sum(sizes.values()) for kind, sizes in self.sizes.items()}


@dataclass(frozen=True)
class Links:
    """Interconnect of the ranks. Bandwidths are per rank, in one direction."""

    nodes: int
    ranks_per_node: int
    intra_gb_s: float
    inter_gb_s: float
    latency_us: float | None
    """Latency of one ring or tree step between nodes; None uses NCCL's tuner values, by protocol."""
    intra_latency_us: float | None = None
    """Latency of one step within a node; None as above."""
    gloo: bool = False
    """Gloo is used instead of NCCL: a reduce-scatter is an all-reduce of which a rank keeps its part, and there are
    only rings."""

    @property
    def world(self) -> int:
        """Return the number of ranks."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class StepTraffic:
    """The traffic of one optimizer step."""

    rank_bytes: dict[str, float]
    """Bytes sent by every rank, by kind."""
    intra_bytes: float
    """Bytes that every rank sends within its node."""
    inter_bytes: float
    """Bytes that every rank sends to other nodes, averaged over the node."""
    time_s: float
    """Sum over all collectives, run one after the other."""
    once_s: float
    """Part of `time_s` for traffic after the forward and backward passes."""
    averaged_s: float
    """Part of `time_s` for gathers of the EMA target, which overlap the student's forward pass."""


def step_traffic(
    traffic: Traffic, last_micro_batch: Traffic, links: Links, *, further: int, group: int = 1
) -> StepTraffic:
    """Return the cost of a step's collectives.

    A ring of n ranks sends (n − 1)/n of the tensor over each of its links. If it spans nodes, a node's rings leave it
    over all its network ports, so each port carries the ring traffic of one rank. A ring takes n − 1 steps, of which
    (nodes − 1) go between nodes. An all-reduce takes twice that, or goes up and down NCCL's trees. Every collective
    uses the fastest protocol for its size, as NCCL's tuner chooses.

    Args:
        traffic: traffic of a step with few micro-batches.
        last_micro_batch: traffic of the last one of these micro-batches.
        links: interconnect of the ranks.
        further: additional micro-batches of the step; each repeats the last one.
        group: consecutive ranks that share a second copy of the shards.
    """
    rank_bytes: dict[str, float] = {}
    intra = inter = time_s = once_s = averaged_s = 0.0
    for kind in traffic.sizes:
        repeats = 0 if kind in ONCE_A_STEP else further
        last = last_micro_batch.sizes.get(kind, Counter())
        calls = traffic.sizes[kind] + Counter({size: n * repeats for size, n in last.items()})
        ranks = group if kind == IN_GROUP else links.world
        passes = 2 if links.gloo and kind == "reduce-scatter" else _PASSES.get(kind, 1)
        sent = sum(size * n for size, n in calls.items()) * passes * (ranks - 1) / ranks
        rank_bytes[kind] = sent
        within = ranks <= links.ranks_per_node and links.ranks_per_node % ranks == 0
        crossing = 0.0 if within else sent / links.ranks_per_node
        inter += crossing
        intra += sent - crossing
        nodes = 1 if within else max(2, math.ceil(ranks / links.ranks_per_node))
        seconds = sum(n * _call_s(links, size, ranks, nodes, passes) for size, n in calls.items())
        time_s += seconds
        once_s += seconds if kind in AFTER_BACKWARD else 0.0
        averaged_s += seconds if kind == AVERAGED else 0.0
    return StepTraffic(rank_bytes, intra, inter, time_s, once_s, averaged_s)


def _call_s(links: Links, size: float, ranks: int, nodes: int, passes: int) -> float:
    """Return the seconds of one collective over a tensor of `size` bytes."""
    if ranks == 1:
        return 0.0
    sent_gb = size * passes * (ranks - 1) / ranks / 1e9
    ring_gb_s = links.intra_gb_s if nodes == 1 else links.inter_gb_s * links.ranks_per_node
    if nodes > 1 and links.ranks_per_node > 1:  # a ring also crosses its nodes, with all but its outgoing traffic
        ring_gb_s = min(ring_gb_s, links.intra_gb_s * links.ranks_per_node / (links.ranks_per_node - 1))
    between, all_steps = passes * (nodes - 1), passes * (ranks - 1)
    if links.gloo:
        inside_us = (all_steps - between) * (links.intra_latency_us or 0.0)
        return sent_gb / ring_gb_s + (between * (links.latency_us or 0.0) + inside_us) * 1e-6
    ways = []
    for protocol in PROTOCOLS:
        most = protocol.most_gb_s[min(nodes, 3) - 1]
        intra_us = max(protocol.ring_intra_us, protocol.overhead_us if nodes > 1 else 0.0)
        ring_us = (all_steps - between) * _given(links.intra_latency_us, intra_us)
        ring_us += between * _given(links.latency_us, protocol.ring_inter_us) + protocol.ring_us
        ways.append(sent_gb / min(ring_gb_s * protocol.share, most) + ring_us * 1e-6)
        if passes == 2:
            tree_us = (ranks // nodes - 1) * _given(links.intra_latency_us, protocol.tree_intra_us)
            tree_us += math.log2(nodes) * _given(links.latency_us, protocol.tree_inter_us)
            seconds = sent_gb / min(ring_gb_s * protocol.tree_share, most)
            ways.append(seconds + (2 * tree_us + protocol.tree_us) * 1e-6)
    return min(ways)


def _given(latency_us: float | None, otherwise_us: float) -> float:
    return otherwise_us if latency_us is None else latency_us
