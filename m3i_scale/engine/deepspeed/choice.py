"""Choose the built-in DeepSpeed config of a run with `deepspeed: auto`: the lowest ZeRO stage whose states leave enough
memory for activations.

Low stages have the least CPU overhead (docs/benchmarks/gpu.md). The choice depends only on the model, the number of
ranks and the device. It does not change the global batch or the micro-batch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from deepspeed.accelerator import get_accelerator

from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.engine.deepspeed.rules import BYTES, accumulation, precision, state_bytes, takes_bf16_optimizer
from m3i_scale.engine.device import has_fast_bf16
from m3i_scale.host.machine import read_machine
from m3i_scale.objective.information import Objective, role_of
from m3i_scale.rank_variables import ranks_on_host
from m3i_scale.text import size_text

STATES_SHARE = 0.25
"""Fraction of the memory that states may take. The rest is for activations, gathered weights and buckets, which `plan`
estimates."""
BUILT_IN = {
    "bf16": ("zero1_bf16", "zero2_bf16", "zero3_bf16"),
    "fp16": ("zero3_fp16",),
    "cpu": ("zero1_cpu_fp32", "zero3_cpu_fp32"),
}
"""Candidates by kind of device, the lowest stage first."""
_EMA_BYTES = {"fp32": 0, "bf16": 2, "fp16": 4}
"""Bytes per element of the EMA in addition to its compute copy (see `ShardedEma`)."""


@dataclass(frozen=True)
class Device:
    """Device of one rank."""

    kind: Literal["bf16", "fp16", "cpu"]
    """`bf16` and `fp16`: an accelerator with and without bf16 instructions."""
    memory_bytes: int
    """On a CPU, the share of one process."""


def device_here(ranks: int) -> Device:
    """Return the device of a rank on this machine. Before a start, all `ranks` count as ranks of this machine."""
    if get_accelerator().device_name() == "cpu":
        return Device("cpu", read_machine().memory_total // (ranks_on_host(os.environ) or ranks))
    return Device("bf16" if has_fast_bf16() else "fp16", int(get_accelerator().total_memory()))


def choose_ds_config(
    objective: Objective, world_size: int, device: Device, supports: Callable[[dict[str, Any]], bool] = lambda raw: True
) -> tuple[str, str]:
    """Return the name of a built-in DeepSpeed config, and the reason in words.

    Args:
        objective: the complete model, e.g. on `meta`.
        supports: whether the run supports a config, given its JSON. If it supports none, the highest stage is returned,
            and the checks of the run report why.
    """
    numel: Counter[str] = Counter()
    for name, parameter in objective.named_parameters():
        numel[role_of(name, parameter)] += parameter.numel()
    raws = {name: load_ds_config(name) for name in BUILT_IN[device.kind]}
    names = [name for name in raws if supports(raws[name])] or [*raws][-1:]
    taken = {name: rank_state_bytes(numel, raws[name], world_size) for name in names}
    limit = STATES_SHARE * device.memory_bytes
    chosen = next((name for name in names if taken[name] <= limit), min(names, key=lambda name: taken[name]))
    unit, ranks = "process" if device.kind == "cpu" else "device", f"{world_size} rank{'s' * (world_size != 1)}"
    reason = f"states take {size_text(taken[chosen])} of {size_text(device.memory_bytes)} per {unit} on {ranks}"
    if lower := names[: names.index(chosen)]:
        reason += f", with {lower[-1]} {size_text(taken[lower[-1]])}"
    return chosen, reason


def rank_state_bytes(numel: Counter[str], config: dict[str, Any], world_size: int) -> int:
    """Return the bytes of parameters, gradients, optimizer states and EMA on one rank, without padding and buckets.

    Args:
        numel: elements of the parameters by role: trained, ema, teacher, frozen.
        config: a DeepSpeed config without offload.
    """
    stage, size = config["zero_optimization"]["stage"], BYTES[precision(config)]
    master, moment = state_bytes(config)
    everywhere, partitioned = numel.total() * size, numel["trained"] * (master + 2 * moment)
    partitioned += numel["ema"] * _EMA_BYTES[precision(config)]
    accumulated = numel["trained"] * BYTES[accumulation(config)]
    if stage > 1:
        partitioned += accumulated
    else:  # the BF16 optimizer accumulates in separate gradients of the complete model
        everywhere += accumulated + (numel["trained"] * size if takes_bf16_optimizer(config) else 0)
    if stage == 3:
        everywhere, partitioned = 0, partitioned + everywhere
    return everywhere + partitioned // world_size
