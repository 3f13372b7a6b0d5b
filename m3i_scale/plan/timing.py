"""Estimate the time of a step: published rates of GPUs and links, communication over NCCL's or gloo's rings of
consecutive ranks, and the CPU time of Python that queues kernels and of ZeRO's overhead.

CPU times are measured by `benchmarks/host_time.py`, on one core of an Intel Xeon (docs/benchmarks/gpu.md). A compiled
layer takes
less. The benchmark's model has 4,579 operations and 1,595 parameters, and under stage 3 17,448 pieces on 8 ranks and
139,584 on 64.

`PIECE_US` is the additional time of the forward and backward pass on 64 ranks compared with 8, divided by the
additional pieces. `OPERATION_US` is the remaining time of both passes, divided by the operations: under stages 1, 2 and
3 on one rank 22.3, 34.6 and 66.8 µs, on eight 23.7, 31.6 and 77.1. `UPDATE_US` is the optimizer's step, divided by the
parameters: on eight ranks 8.0, 7.6 and 33.7 µs, under stage 3 on one 27.6. Vectors shorter than the number of ranks are
padded, which takes longer and is not counted: on 512 ranks second copies of the parameters (`zero_hpz_partition_size`)
saved 22 % of that model's time, and by these numbers 9 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from m3i_scale.engine.peak import TFLOPS
from m3i_scale.errors import ConfigError, did_you_mean
from m3i_scale.plan.traffic import AFTER_BACKWARD, AVERAGED, FETCH, IN_GROUP, LAST_BACKWARD, STEP_REDUCTION, Traffic

_PASSES = {"all-reduce": 2, STEP_REDUCTION: 2, LAST_BACKWARD: 2, FETCH: 2}
"""Passes of the data over a ring: an all-reduce is a reduce-scatter and an all-gather."""
OPERATION_US = {1: 22.0, 2: 31.0, 3: 75.0}
"""By stage, per operation of the forward or backward pass that creates a tensor: its CPU time and its share of
DeepSpeed's hooks on modules and gradients."""
UPDATE_US = {1: 8.0, 2: 8.0, 3: 31.0}
"""By stage, per parameter in the optimizer's step."""
PIECE_US = 2.0
"""Per rank and parameter that is gathered or reduced under stage 3 (`AllGatherCoalescedHandle.wait`,
`reduce_scatter_coalesced`)."""


@dataclass(frozen=True)
class Hardware:
    """A rank's device. Peak rates are without sparsity, bandwidths in one direction."""

    tflops: dict[str, float]
    """Peak rate by precision, in 10¹² FLOP/s."""
    intra_gb_s: float
    inter_gb_s: float
    mfu: float
    """Assumed fraction of the peak rate."""
    latency_us: float | None = None
    """Latency of a ring step between nodes, in µs. None uses NCCL's tuner values, by protocol and size
    (`PROTOCOLS`)."""
    intra_latency_us: float | None = None
    """The same within a node."""


PRESETS = {
    # NVIDIA's data sheet of the H100 SXM (dense rates, NVLink 900 GB/s both ways) and of the DGX H100 (one 400 Gb/s
    # port a GPU). The MFU, here and below, was measured for CLIP g/14 with NVIDIA's NeMo on 8 GPUs
    # (docs/benchmarks/scaling.md).
    "h100": Hardware({**TFLOPS["h100"], "fp32": 67.0}, intra_gb_s=450.0, inter_gb_s=50.0, mfu=0.21),
    # The A100 SXM (dense rates, NVLink 600 GB/s both ways) and the DGX A100 (one 200 Gb/s port a GPU).
    "a100": Hardware({**TFLOPS["a100"], "fp32": 19.5}, intra_gb_s=300.0, inter_gb_s=25.0, mfu=0.39),
    # Matrix products on one core of an AMD EPYC; bandwidths, latencies and the MFU are assumptions.
    "cpu": Hardware(
        {"bf16": 0.2, "fp16": 0.09, "fp32": 0.09},
        intra_gb_s=2.0,
        inter_gb_s=1.0,
        mfu=0.4,
        latency_us=100.0,
        intra_latency_us=100.0,
    ),
}


def hardware(name: str) -> Hardware:
    """Return a preset."""
    if name not in PRESETS:
        raise ConfigError(f"unknown hardware '{name}'", where="--hardware", fix=did_you_mean(name, PRESETS))
    return PRESETS[name]


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
    last_s: float = 0.0
    """Part of `time_s` for reductions that overlap the backward pass of the last micro-batch."""


def step_traffic(traffic: Traffic, links: Links, *, group: int = 1) -> StepTraffic:
    """Return the cost of a step's collectives. `group` consecutive ranks share a second copy of the shards.

    A ring of n ranks sends (n − 1)/n of the tensor over each of its links. If it spans nodes, a node's rings leave it
    over all its network ports, so each port carries the ring traffic of one rank. A ring takes n − 1 steps, of which
    (nodes − 1) go between nodes. An all-reduce takes twice that, or goes up and down NCCL's trees. Every collective
    uses the fastest protocol for its size, as NCCL's tuner chooses.
    """
    rank_bytes: dict[str, float] = {}
    intra = inter = time_s = once_s = averaged_s = last_s = 0.0
    for kind, calls in traffic.sizes.items():
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
        last_s += seconds if kind == LAST_BACKWARD else 0.0
    return StepTraffic(rank_bytes, intra, inter, time_s, once_s, averaged_s, last_s)


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


def host_time(*, stage: int, operations: int, parameters: int, pieces: int) -> float:
    """Return the CPU time of a step in seconds, given the operations that create a tensor (over all micro-batches), the
    parameters of the full model, and `Traffic.pieces`."""
    return 1e-6 * (OPERATION_US[stage] * operations + UPDATE_US[stage] * parameters + PIECE_US * pieces)


def step_time(traffic: StepTraffic, *, compute_s: float, host_s: float, overlap: bool, micro_batches: int = 1) -> float:
    """Return the step time in seconds: the longer of arithmetic and overlapping communication, plus the rest, and at
    least the CPU time. Without `overlap`, gathers of the EMA target overlap, and reductions in the last backward pass,
    which is two thirds of the arithmetic of one micro-batch."""
    last_s = min(traffic.last_s, compute_s / micro_batches * 2 / 3)
    hidden_s = traffic.time_s - traffic.once_s if overlap else traffic.averaged_s + last_s
    return max(host_s, max(compute_s, hidden_s) + traffic.time_s - hidden_s)
