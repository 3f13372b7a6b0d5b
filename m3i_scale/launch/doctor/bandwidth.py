"""How fast ranks talk: all-reduce and all-gather of a group of hosts, one rank each, over the accelerator's backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

FIRST_BYTES = 1 << 20
MOST_BYTES = 64 << 20
ROUND_S = 0.2
"""How long one collective may take, about: a slow link is measured with less."""
REPEATS = 4
SMALL_REPEATS = 20


def measure_links(store: Any, key: str, rank: int, world: int, seconds: float) -> dict[str, Any]:
    """Latency and bandwidth of a group; all its members call it at the same time.

    Bandwidths are those of a rank's link: what has to pass it, 2(n−1)/n of the bytes of an all-reduce and (n−1)/n of
    the bytes that an all-gather makes, over the time of the best of a few rounds.

    Args:
        store: that all members have joined.
        key: names the group; never used before.
        rank: in the group.
        world: size of the group.
        seconds: before it counts as failed.

    Raises:
        RuntimeError: the ranks cannot connect, or one has gone.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(0)
    backend = accelerator.communication_backend_name()
    patience = timedelta(seconds=seconds)
    store.set_timeout(patience)
    dist.init_process_group(backend, store=PrefixStore(key, store), rank=rank, world_size=world, timeout=patience)
    try:
        return {"backend": backend, **_figures(torch.device(accelerator.current_device_name()), world)}
    finally:
        dist.destroy_process_group()


def _figures(device: torch.device, world: int) -> dict[str, float]:
    small = torch.ones(1, device=device)
    latency_s = _best(lambda: dist.all_reduce(small), SMALL_REPEATS)
    first = torch.ones(FIRST_BYTES // 4, device=device)
    size = _size(_slowest(_best(lambda: dist.all_reduce(first), 2), device))
    whole = torch.ones(size // 4, device=device)
    reduce_s = _best(lambda: dist.all_reduce(whole), REPEATS)
    part = torch.ones(max(1, whole.numel() // world), device=device)
    parts = [torch.empty_like(part) for _ in range(world)]
    gather_s = _best(lambda: dist.all_gather(parts, part), REPEATS)
    gathered = world * part.numel() * 4
    return {
        "latency_us": latency_s * 1e6,
        "all_reduce_gb_s": 2 * (world - 1) / world * size / reduce_s / 1e9,
        "all_gather_gb_s": (world - 1) / world * gathered / gather_s / 1e9,
        "bytes": size,
    }


def _size(first_s: float) -> int:
    """Bytes that take about `ROUND_S`, the same on all ranks."""
    wanted = FIRST_BYTES * ROUND_S / max(first_s, 1e-9)
    return int(min(MOST_BYTES, max(FIRST_BYTES, wanted))) // 4096 * 4096


def _slowest(seconds: float, device: torch.device) -> float:
    worst: Tensor = torch.tensor([seconds], dtype=torch.float32, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def _best(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of the quickest; a first one is not counted."""
    accelerator = get_accelerator()
    times = []
    for _ in range(repeats + 1):
        accelerator.synchronize()
        began = time.perf_counter()
        work()
        accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
