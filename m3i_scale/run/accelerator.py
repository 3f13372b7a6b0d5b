"""GPU checks before training: unusable GPUs are reported clearly, not as hangs or as CUDA and NCCL errors."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from m3i_scale.engine.agree import gather_objects
from m3i_scale.engine.deepspeed.rules import precision
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.host.machine import interfaces
from m3i_scale.text import size_text

_TAKEN = 0.2
"""Fraction of a GPU's memory that other processes can use without a warning. Displays and monitoring need less."""
_BF16_CAPABILITY = 8
"""Minimum major compute capability for bf16 (Ampere). On older GPUs, torch emulates bf16 with fp32."""
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Allocator variables: the name in all PyTorch versions, which has priority, and the name since 2.9."""
RELEASED_S = 10.0
"""Seconds in which a killed process may still occupy its GPU."""
_LOOK_S = 0.2


def extend_segments() -> None:
    """Enable expandable segments in PyTorch's CUDA allocator, unless a variable configures it. Call it before CUDA is
    initialized, when the allocator reads the variable.

    Crops and captions vary in length: fixed-size segments fragment, so that a rank runs out of memory despite free
    memory. https://pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf
    """
    chosen = any(name in os.environ for name in ALLOCATOR)
    if get_accelerator().device_name() == "cuda" and torch.version.hip is None and not chosen:
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def check_before_joining(devices: Path = Path("/dev")) -> None:
    """Check the GPU of this rank before the rendezvous, including silent fallback to the CPU. Let gloo use the network
    interface of NCCL, unless one is set for gloo. `devices` is the folder with the device files of GPUs."""
    name = get_accelerator().device_name()
    if name == "cpu":
        _check_driver(devices)
    if name != "cuda":
        return
    local, count = int(os.environ.get("LOCAL_RANK", "0")), get_accelerator().device_count()
    if local >= count:
        raise UserError(
            f"rank {local} of this host has no GPU: {count} can be seen",
            where=f"LOCAL_RANK={local}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}",
            fix="as many ranks a host as it has GPUs, and every GPU visible to every rank",
        )
    interface = _interface_of_nccl(interfaces())
    if interface is not None:  # otherwise gloo uses the address of the hostname, which may be the loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def check_distinct_cards() -> None:
    """Check that no two ranks share a GPU, which NCCL reports unclearly. Every rank must call it, after the
    rendezvous and before the first GPU collective."""
    if get_accelerator().device_name() != "cuda":
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # A MIG slice can share the UUID of its GPU; a process only sees one slice, by name.
    card = visible if visible.startswith("MIG-") else str(torch.cuda.get_device_properties().uuid)
    cards = gather_objects(card)
    twice, count = Counter(cards).most_common(1)[0]
    if count > 1:
        ranks = [rank for rank, other in enumerate(cards) if other == twice]
        raise UserError(
            f"ranks {ranks[0]} and {ranks[1]} have the same GPU",
            where=f"GPU {twice}",
            why="two ranks on one GPU cannot join one group",
            fix="start ranks with LOCAL_RANK counted per host, and every GPU of it visible to every rank",
        ).raised_everywhere()


def check_card(config: dict[str, Any]) -> None:
    """Check that this rank's GPU supports the precision of the run, given its resolved DeepSpeed config."""
    if get_accelerator().device_name() != "cuda":
        return
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if precision(config) == "bf16" and major < _BF16_CAPABILITY and torch.version.hip is None:
        raise ConfigError(
            f"{name} (compute capability {major}.{minor}) has no bf16",
            where="deepspeed: bf16.enabled",
            why="torch would compute it by way of fp32, many times slower",
            fix="deepspeed=zero3_fp16, or a GPU of capability 8.0 or newer",
        )


def check_memory(needed: int, tell: Callable[[str], None]) -> None:
    """Check that this rank's device has enough memory for its known states: `needed` bytes of weights, optimizer states
    and EMA. `tell` is called if other processes use much of the memory but leave enough."""
    if get_accelerator().device_name() == "cpu":
        return
    total = get_accelerator().total_memory()
    if needed > total:
        raise UserError(
            f"a rank holds {size_text(needed)} of weights, moments and averages, and its device has {size_text(total)}",
            why="activations, gathered weights and buffers come on top",
            fix="m3i-scale plan says what fits: more ranks, ZeRO-3, an optimizer on the host (zero3_bf16_cpu_offload), "
            "a smaller model",
        )
    if get_accelerator().device_name() != "cuda":
        return
    free, total = torch.cuda.mem_get_info()
    deadline = time.monotonic() + RELEASED_S
    while free < needed and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        free, total = torch.cuda.mem_get_info()
    taken = (
        f"other processes have {size_text(total - free)} of the {size_text(total)} of {torch.cuda.get_device_name()}"
    )
    if free < needed:
        raise UserError(
            taken,
            why=f"a rank holds {size_text(needed)} of weights, moments and averages",
            fix="nvidia-smi names them: end them, or take another GPU (CUDA_VISIBLE_DEVICES)",
        )
    if free < (1 - _TAKEN) * total:
        tell(f"rank {os.environ.get('RANK', '0')}: {taken}; nvidia-smi names them")


def _check_driver(devices: Path) -> None:
    """Raise an error if torch is built for GPUs that it cannot use: the run would silently use the CPU."""
    # Schedulers hide GPUs by invalid values such as NoDevFiles, or by removing access rights.
    hidden = re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0")) is None
    there = any(os.access(device, os.R_OK | os.W_OK) for device in devices.glob("nvidia[0-9]*"))
    if torch.version.cuda is None or "DS_ACCELERATOR" in os.environ or hidden or not there:
        return
    try:
        torch.cuda.init()
    except RuntimeError as error:
        raise UserError(
            f"torch cannot use the GPUs of this host: {str(error).splitlines()[0]}",
            why="the run would go on without them, on the CPU",
            fix=f"a driver for CUDA {torch.version.cuda}, or a torch for this driver; to train on the CPU: "
            "CUDA_VISIBLE_DEVICES=",
        ) from None


def _interface_of_nccl(there: Mapping[str, list[str]]) -> str | None:
    """Return the first interface with an address that is selected for NCCL; None if none is selected or some are only
    excluded. NCCL accepts prefixes, `=` for exact names, and `^` for exclusion."""
    choice = os.environ.get("NCCL_SOCKET_IFNAME", "")
    names = [name for name in choice.removeprefix("^").removeprefix("=").split(",") if name]
    if not names or choice.startswith("^"):
        return None
    usable = [name for name, addresses in there.items() if addresses]
    chosen = [have for have in usable if (have in names if choice.startswith("=") else have.startswith(tuple(names)))]
    if not chosen:
        raise UserError(
            "NCCL would have no network: no interface with an address has the name that is chosen",
            where=f"NCCL_SOCKET_IFNAME={choice}",
            fix=f"one of {', '.join(sorted(usable))}; or unset it",
        )
    return chosen[0]
