"""Bytes between ranks, and how long they take: rings, as NCCL builds them over consecutive ranks, and as gloo does."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

ONCE_A_STEP = ("update", "all-reduce of the step")
"""Traffic that does not grow with the number of micro-batches."""
IN_GROUP = "gather in the group"
"""Gathers from second copies of the shards (`zero_hpz_partition_size`)."""
_PASSES = {"all-reduce": 2, "all-reduce of the step": 2}
"""How often a ring carries its data: an all-reduce is a reduce-scatter and an all-gather."""


@dataclass
class Traffic:
    """Bytes and calls by kind: the size of the whole tensor of every collective."""

    bytes: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    calls: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, kind: str, size: int, calls: int = 1) -> None:
        """Collectives over `size` bytes together."""
        if size:
            self.bytes[kind] += size
            self.calls[kind] += calls

    def __add__(self, other: Traffic) -> Traffic:
        found = Traffic(self.bytes.copy(), self.calls.copy())
        for kind, size in other.bytes.items():
            found.bytes[kind] += size
            found.calls[kind] += other.calls[kind]
        return found


@dataclass(frozen=True)
class Links:
    """What connects the ranks. Bandwidths of one rank, in one direction."""

    nodes: int
    ranks_per_node: int
    intra_gb_s: float
    inter_gb_s: float
    latency_us: float
    """Of one step of a ring from a node to the next."""
    intra_latency_us: float = 0.0
    """Of one step within a node."""
    gloo: bool = False
    """Gloo carries it, not NCCL: a reduce-scatter is an all-reduce of which a rank keeps its part, and there are rings
    only."""

    @property
    def world(self) -> int:
        """Ranks."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class StepTraffic:
    """One optimizer step."""

    rank_bytes: dict[str, float]
    """By kind, what every rank sends."""
    intra_bytes: float
    """What every rank sends within its node."""
    inter_bytes: float
    """What every rank sends to other nodes, on average over the node."""
    time_s: float
    """One collective after the other."""
    once_s: float
    """Of these seconds, those of traffic that comes when forward and backward passes are over."""


def step_traffic(traffic: Traffic, again: Traffic, links: Links, *, further: int, group: int = 1) -> StepTraffic:
    """From the collectives of a step to what they cost.

    A ring of n ranks sends (n − 1)/n of the tensor over every one of its links. Where it spans nodes, the rings of a
    node leave it over all of its network ports, so that a port carries the ring's share of one rank. It takes n − 1
    steps, of which as many go from node to node as there are nodes but one; an all-reduce takes twice that, or goes up
    and down NCCL's trees, where that is quicker.

    Args:
        traffic: of a step with few micro-batches.
        again: of the last one of these micro-batches.
        links: between the ranks.
        further: micro-batches that the step has beside them; each does what the last one does.
        group: consecutive ranks that hold a second copy of the shards between them.
    """
    rank_bytes: dict[str, float] = {}
    intra = inter = time_s = once_s = 0.0
    for kind in traffic.bytes:
        repeats = 0 if kind in ONCE_A_STEP else further
        size = traffic.bytes[kind] + repeats * again.bytes[kind]
        calls = traffic.calls[kind] + repeats * again.calls[kind]
        ranks = group if kind == IN_GROUP else links.world
        passes = 2 if links.gloo and kind == "reduce-scatter" else _PASSES.get(kind, 1)
        sent = size * passes * (ranks - 1) / ranks
        rank_bytes[kind] = sent
        within = ranks <= links.ranks_per_node and links.ranks_per_node % ranks == 0
        crossing = 0.0 if within else sent / links.ranks_per_node
        inter += crossing
        intra += sent - crossing
        slowest = max((sent - crossing) / links.intra_gb_s, crossing / links.inter_gb_s) / 1e9
        nodes = 1 if within else max(2, math.ceil(ranks / links.ranks_per_node))
        seconds = slowest + calls * _latency_s(links, ranks, nodes, passes)
        time_s += seconds
        once_s += seconds if kind in ONCE_A_STEP else 0.0
    return StepTraffic(rank_bytes, intra, inter, time_s, once_s)


def _latency_s(links: Links, ranks: int, nodes: int, passes: int) -> float:
    """Of one collective, in the steps that NCCL's own tuner counts (`src/graph/tuning.cc`)."""
    between = passes * (nodes - 1)
    steps_us = between * links.latency_us + (passes * (ranks - 1) - between) * links.intra_latency_us
    if passes == 2 and not links.gloo:
        tree_us = 2 * ((ranks // nodes - 1) * links.intra_latency_us + math.log2(nodes) * links.latency_us)
        steps_us = min(steps_us, tree_us)
    return steps_us * 1e-6
