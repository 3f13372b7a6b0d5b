"""Resource requirements of a run, and cheap checks before the engine starts. `m3i-scale doctor` runs all checks."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from m3i_scale.backbones.build import backbone_config
from m3i_scale.checkpoint.layout import step_name
from m3i_scale.checkpoint.saver import expected_bytes
from m3i_scale.config import CheckpointConfig, RunConfig
from m3i_scale.config.views import view_sizes
from m3i_scale.data.parts import PREFETCH_PARTS
from m3i_scale.data.reader import OPEN_SHARDS
from m3i_scale.engine.agree import gather_objects, together
from m3i_scale.engine.deepspeed.rules import offloads_optimizer
from m3i_scale.host.findings import Finding, compare_hosts, errors_in, not_ready
from m3i_scale.host.machine import Needs, disk_finding, machine_findings, read_machine
from m3i_scale.objective.build import build_on_meta
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.rank_variables import ranks_on_host
from m3i_scale.run import software
from m3i_scale.run.accelerator import check_card, check_memory
from m3i_scale.run.setup import ResolvedRun, resolve_engine

_FILES_OF_A_RANK = 128
"""Open files of a rank for libraries, logs and pipes."""
_FILES_OF_A_WORKER = 8
_GROUPS = 4
"""Number of process groups in which a rank may connect to every other rank."""


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
    if config is None:
        config = resolve_engine(run, world_size, model.hidden_size).config
    with torch.random.fork_rng(devices=[]):  # building the model must not change the random state of the run
        objective = build_on_meta(run, label_sets, vocab_size if recipe.uses_text else None)
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
    count = retained_checkpoints(run.checkpoint, run.optim.steps)
    loaders = 1 + bool(run.data.validation)  # workers of both loaders exist and hold parts for the entire run
    return Needs(
        ranks=ranks_here,
        world_size=world_size,
        checkpoint_bytes=checkpoint,
        kept_checkpoints=count,
        kept_bytes=_retained_bytes(run.checkpoint, checkpoint, count),
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


def _retained_bytes(config: CheckpointConfig, checkpoint: int, count: int) -> int:
    whole = count * checkpoint
    if config.max_bytes is None:
        return whole
    return min(whole, max(config.max_bytes, checkpoint) + checkpoint)


def check_software(run: RunConfig) -> None:
    """Check that all ranks have the same code, Python, packages and config. If not, all ranks raise an error with the
    differences to the node of rank 0. Every rank must call it, before any other collective operation."""
    if dist.get_world_size() == 1:
        return
    own = together(
        lambda: {"python": software.software_versions(), "code": software.code(), "config": software.run_values(run)},
        names_rank=True,
    )
    digests = gather_objects(software.digest(own))
    if len(set(digests)) == 1:
        return
    answers: dict[str, Any] = {}
    for rank, (host, answer) in enumerate(gather_objects((socket.gethostname(), own))):
        apart = host in answers and software.digest(answers[host]) != digests[rank]  # two environments on one node
        answers[f"{host}, rank {rank}" if apart else host] = answer
    raise not_ready(errors_in(compare_hosts(answers, software.CHECKS))).raised_everywhere()


def check_machines(resolved: ResolvedRun, tell: Callable[[str], None]) -> None:
    """Run the cheap `doctor` checks on every node before a run starts: memory, /dev/shm, file limits, disk space for a
    checkpoint, and every rank's GPU. Every rank must call it, and all ranks raise together. `tell` is called on a rank
    whose GPU is also used by other processes that leave enough memory."""
    together(lambda: check_card(resolved.deepspeed.config), names_rank=True)
    looks = os.environ.get("LOCAL_RANK", "0") == "0"  # one rank per node
    nothing: tuple[list[Finding], int] = [], 0
    hosts = gather_objects(together(lambda: _findings_here(resolved) if looks else nothing))
    errors = errors_in(dict.fromkeys(finding for findings, _ in hosts for finding in findings))
    if errors:
        raise not_ready(errors)
    needed = max(of_a_rank for _, of_a_rank in hosts)
    together(lambda: check_memory(needed, tell), names_rank=True)


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
