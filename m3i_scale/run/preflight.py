"""Checks of GPUs, software and nodes before the engine starts, and what a run needs of them. Problems are reported
clearly, not as hangs or as CUDA and NCCL errors. `m3i-scale doctor` runs more checks."""

from __future__ import annotations

import math
import os
import re
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from m3i_scale.backbones.build import backbone_config
from m3i_scale.checkpoint.layout import step_name
from m3i_scale.checkpoint.stream import expected_bytes
from m3i_scale.config import CheckpointConfig, RunConfig
from m3i_scale.config.views import view_sizes
from m3i_scale.data.parts import PREFETCH_PARTS
from m3i_scale.data.reader import OPEN_SHARDS
from m3i_scale.engine.agree import gather_objects, together
from m3i_scale.engine.deepspeed.rules import offloads_optimizer, precision
from m3i_scale.errors import ConfigError, UserError
from m3i_scale.host.findings import Finding, compare_hosts, errors_in, not_ready
from m3i_scale.host.machine import Needs, disk_finding, interfaces, machine_findings, read_machine
from m3i_scale.objective.build import build_on_meta
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.rank_variables import ranks_on_host
from m3i_scale.run import software
from m3i_scale.run.setup import ResolvedRun, choose_engine, resolve_engine
from m3i_scale.text import size_text

_BF16_CAPABILITY = 8
"""Minimum major compute capability for bf16 (Ampere). On older GPUs, torch emulates bf16 with fp32."""
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Allocator variables: the name in all PyTorch versions, which has priority, and the name since 2.9."""
RELEASED_S = 10.0
"""Seconds in which a killed process may still occupy its GPU."""
_LOOK_S = 0.2
_FILES_OF_A_RANK = 128
"""Open files of a rank for libraries, logs and pipes."""
_FILES_OF_A_WORKER = 8
_GROUPS = 4
"""Number of process groups in which a rank may connect to every other rank."""


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
            f"rank {local} of this host has no GPU: {count} are visible",
            where=f"LOCAL_RANK={local}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}",
            fix="start one rank per GPU, and make all GPUs visible to every rank",
        )
    interface = _interface_of_nccl()
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
            fix="count LOCAL_RANK per host, and make all GPUs of a host visible to every rank",
        ).raised_everywhere()


def check_software(run: RunConfig) -> None:
    """Check that all ranks have the same code, Python, packages and config. If not, all ranks raise an error with the
    differences to the node of rank 0. Every rank must call it, before any other collective operation."""
    if dist.get_world_size() == 1:
        return
    facts = together(
        lambda: {"python": software.software_versions(), "code": software.code(), "config": software.run_values(run)},
        names_rank=True,
    )
    digests = gather_objects(software.digest(facts))
    if len(set(digests)) == 1:
        return
    answers: dict[str, Any] = {}
    for rank, (host, answer) in enumerate(gather_objects((socket.gethostname(), facts))):
        apart = host in answers and software.digest(answers[host]) != digests[rank]  # two environments on one node
        answers[f"{host}, rank {rank}" if apart else host] = answer
    raise not_ready(errors_in(compare_hosts(answers, software.CHECKS))).raised_everywhere()


def check_machines(resolved: ResolvedRun) -> None:
    """Run the cheap `doctor` checks on every node before a run starts: memory, /dev/shm, file limits, disk space for a
    checkpoint, and every rank's GPU. Every rank must call it, and all ranks raise together."""
    together(lambda: check_card(resolved.deepspeed.config), names_rank=True)
    looks = os.environ.get("LOCAL_RANK", "0") == "0"  # one rank per node
    nothing: tuple[list[Finding], int] = [], 0
    hosts = gather_objects(together(lambda: _findings_here(resolved) if looks else nothing))
    errors = errors_in(dict.fromkeys(finding for findings, _ in hosts for finding in findings))
    if errors:
        raise not_ready(errors)
    needed = max(of_a_rank for _, of_a_rank in hosts)
    together(lambda: check_memory(needed), names_rank=True)


def _findings_here(resolved: ResolvedRun) -> tuple[list[Finding], int]:
    """Return the results for this node, and the state bytes per rank. One rank per node calls it."""
    host, run, world = socket.gethostname(), resolved.run, dist.get_world_size()
    config = resolved.deepspeed.config
    ranks_here = min(world, ranks_on_host(os.environ) or 1)
    needs = needs_of(
        run, resolved.label_sets, resolved.vocab_size or 0, world_size=world, ranks_here=ranks_here, config=config
    )
    findings = machine_findings(host, read_machine(), needs, on_host=get_accelerator().device_name() == "cpu")
    if not (run.output_dir / "checkpoints" / step_name(run.optim.steps)).exists():  # otherwise there is nothing to save
        one_checkpoint = Needs(checkpoint_bytes=needs.checkpoint_bytes)  # retention is checked by `doctor`
        findings.append(disk_finding(host, run.output_dir, one_checkpoint))
    return findings, needs.state_bytes // ranks_here


def check_card(config: dict[str, Any]) -> None:
    """Check that this rank's GPU supports the precision of the run, given its resolved DeepSpeed config."""
    if get_accelerator().device_name() != "cuda":
        return
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if precision(config) == "bf16" and major < _BF16_CAPABILITY and torch.version.hip is None:
        raise ConfigError(
            f"bf16 is not supported by {name} (compute capability {major}.{minor})",
            where="deepspeed: bf16.enabled",
            why="torch would emulate it in fp32, many times slower",
            fix="set deepspeed=zero3_fp16, or use a GPU of compute capability 8.0 or newer",
        )


def check_memory(needed: int) -> None:
    """Check that this rank's device has enough free memory for its known states: `needed` bytes of weights, optimizer
    states and EMA."""
    if get_accelerator().device_name() == "cpu":
        return
    total = get_accelerator().total_memory()
    if needed > total:
        raise UserError(
            f"out of memory: a rank needs {size_text(needed)} for weights, optimizer states and EMA weights, but its "
            f"device has {size_text(total)}",
            why="activations, gathered weights and buffers need more",
            fix="run `m3i-scale plan`; use more ranks, ZeRO-3, an optimizer on the host (zero3_bf16_cpu_offload), or "
            "a smaller model",
        )
    if get_accelerator().device_name() != "cuda":
        return
    free, total = torch.cuda.mem_get_info()
    deadline = time.monotonic() + RELEASED_S
    while free < needed and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        free, total = torch.cuda.mem_get_info()
    if free < needed:
        raise UserError(
            f"other processes use {size_text(total - free)} of the {size_text(total)} of "
            f"{torch.cuda.get_device_name()}",
            why=f"a rank needs {size_text(needed)} for weights, optimizer states and EMA weights",
            fix="end them (`nvidia-smi` lists them), or use another GPU (CUDA_VISIBLE_DEVICES)",
        )


def needs_of(
    run: RunConfig,
    label_sets: dict[str, list[str]],
    vocab_size: int,
    *,
    world_size: int,
    ranks_here: int,
    config: dict[str, Any] | None = None,
) -> Needs:
    """Return the minimum resources that a run needs on a node with `ranks_here` of all ranks. The model is built on
    `meta`, without memory. `config` is the resolved DeepSpeed config, if known."""
    recipe, model = parse_recipe(run.recipe), backbone_config(run.backbone)
    with torch.random.fork_rng(devices=[]):  # building the model must not change the random state of the run
        objective = build_on_meta(run, label_sets, vocab_size if recipe.uses_text else None)
    if config is None:
        run, _ = choose_engine(run, objective, world_size)
        config = resolve_engine(run, world_size, model.hidden_size).config
    checkpoint, offloads = expected_bytes(objective, config), offloads_optimizer(config)
    of_this_host = ranks_here / world_size
    copies = checkpoint * of_this_host if run.checkpoint.background else 0
    far = checkpoint * of_this_host if offloads else 0
    pixels = max(
        3
        * sum(side**2 for side in view_sizes(recipe.drawn_views, stage.image_size(model.image_size)))
        * stage.optim.micro_batch_size
        for stage in (run.in_stage(number) for number in range(len(run.stage_starts)))
    )
    count, limit = retained_checkpoints(run.checkpoint, run.optim.steps), run.checkpoint.max_bytes
    kept = count * checkpoint
    loaders = 1 + bool(run.data.validation)  # workers of both loaders exist and hold parts for the entire run
    return Needs(
        ranks=ranks_here,
        world_size=world_size,
        checkpoint_bytes=checkpoint,
        kept_checkpoints=count,
        kept_bytes=kept if limit is None else min(kept, max(limit, checkpoint) + checkpoint),
        memory_bytes=int(copies + far),
        state_bytes=0 if offloads else int(checkpoint * of_this_host),
        shm_bytes=loaders * ranks_here * PREFETCH_PARTS * pixels if run.data.num_workers else 0,
        open_files=_FILES_OF_A_RANK
        + OPEN_SHARDS
        + _FILES_OF_A_WORKER * loaders * run.data.num_workers
        + _GROUPS * world_size,
    )


def retained_checkpoints(config: CheckpointConfig, steps: int) -> int:
    """Return the maximum number of checkpoints on disk at the same time, including the one being written."""
    saves = math.ceil(steps / config.every_steps)
    kept = config.keep_latest + (config.keep_best.count if config.keep_best is not None else 0)
    if config.keep_every_steps is not None:
        kept += steps // math.lcm(config.keep_every_steps, config.every_steps)
    return min(saves, kept + 1)


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
            why="the run would continue without them, on the CPU",
            fix=f"install a driver for CUDA {torch.version.cuda}, or a torch for this driver; to train on the CPU, "
            "set CUDA_VISIBLE_DEVICES=",
        ) from None


def _interface_of_nccl() -> str | None:
    """Return the first interface with an address that is selected for NCCL; None if none is selected or some are only
    excluded. NCCL accepts prefixes, `=` for exact names, and `^` for exclusion."""
    choice = os.environ.get("NCCL_SOCKET_IFNAME", "")
    names = tuple(name for name in choice.removeprefix("=").split(",") if name)
    if not names or choice.startswith("^"):
        return None
    usable = [name for name, addresses in interfaces().items() if addresses]
    return next((name for name in usable if (name in names if choice[0] == "=" else name.startswith(names))), None)
