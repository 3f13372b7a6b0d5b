"""Estimate the CPU time of a step: Python that queues kernels, and ZeRO's overhead.

Measured by `benchmarks/host_time.py`, on one core of an Intel Xeon (docs/gpu.md). A compiled layer takes less.

Its model has 4,579 operations and 1,595 parameters, and under stage 3 17,448 pieces on 8 ranks and 139,584 on 64.
`PIECE_US` is the additional time of the forward and backward pass on 64 ranks compared with 8, divided by the
additional pieces. `OPERATION_US` is the remaining time of both passes, divided by the operations: under stages 1, 2 and
3 on one rank 22.3, 34.6 and 66.8 µs, on eight 23.7, 31.6 and 77.1. `UPDATE_US` is the optimizer's step, divided by the
parameters: on eight ranks 8.0, 7.6 and 33.7 µs, under stage 3 on one 27.6. Vectors shorter than the number of ranks are
padded, which takes longer and is not counted: on 512 ranks second copies of the parameters (`zero_hpz_partition_size`)
saved 22 % of that model's time, and by these numbers 9 %.
"""

from __future__ import annotations

OPERATION_US = {1: 22.0, 2: 31.0, 3: 75.0}
"""By stage, per operation of the forward or backward pass that creates a tensor: its CPU time and its share of
DeepSpeed's hooks on modules and gradients."""
UPDATE_US = {1: 8.0, 2: 8.0, 3: 31.0}
"""By stage, per parameter in the optimizer's step."""
PIECE_US = 2.0
"""Per rank and parameter that is gathered or reduced under stage 3 (`AllGatherCoalescedHandle.wait`,
`reduce_scatter_coalesced`)."""


def host_time(*, stage: int, operations: int, parameters: int, pieces: int) -> float:
    """Return the CPU time of a step in seconds.

    Args:
        stage: ZeRO stage.
        operations: operations that create a tensor, over all micro-batches.
        parameters: parameters of the full model.
        pieces: see `Traffic.pieces`.
    """
    return 1e-6 * (OPERATION_US[stage] * operations + UPDATE_US[stage] * parameters + PIECE_US * pieces)
