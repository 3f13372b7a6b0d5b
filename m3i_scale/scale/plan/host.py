"""Estimate what a step takes of the host: Python that queues kernels, and what ZeRO does beside them.

Measured by `benchmarks/host_time.py`, on one core of an Intel Xeon (docs/gpu.md). A compiled layer takes less.

Its model has 4,579 operations and 1,595 parameters, and under stage 3 17,448 pieces on 8 ranks and 139,584 on 64.
`PIECE_US` is what forward and backward pass take longer on 64 ranks than on 8, divided by the further pieces.
`OPERATION_US` is what the two take beside the pieces, divided by the operations: under stage 1, 2 and 3 on one rank
22.3, 34.6 and 66.8 µs, on eight 23.7, 31.6 and 77.1. `UPDATE_US` is the optimizer's step, divided by the parameters: on
eight ranks 8.0, 7.6 and 33.7 µs, under stage 3 on one 27.6. Vectors that are shorter than there are ranks are padded,
which takes longer and is not counted: on 512 ranks second copies of the parameters (`zero_hpz_partition_size`) saved
22 % of that model's time, and by these figures 9 %.
"""

from __future__ import annotations

OPERATION_US = {1: 22.0, 2: 31.0, 3: 75.0}
"""By stage, of an operation of forward or backward pass that makes a tensor: its own time, and its share of DeepSpeed's
hooks on modules and gradients."""
UPDATE_US = {1: 8.0, 2: 8.0, 3: 31.0}
"""By stage, of a parameter in the optimizer's step."""
PIECE_US = 2.0
"""Of a rank's piece of a parameter that is gathered or reduced under stage 3 (`AllGatherCoalescedHandle.wait`,
`reduce_scatter_coalesced`), of which there are as many as ranks."""


def host_time(*, stage: int, operations: int, parameters: int, pieces: int) -> float:
    """Return the seconds of a step.

    Args:
        stage: of ZeRO.
        operations: of all micro-batches, that make a tensor.
        parameters: of the whole model.
        pieces: see `Traffic.pieces`.
    """
    return 1e-6 * (OPERATION_US[stage] * operations + UPDATE_US[stage] * parameters + PIECE_US * pieces)
