"""One training step in six engines: torch DDP and FSDP2; bare DeepSpeed and ours, both under ZeRO-1 and ZeRO-3.

All train the same module (the `supervised` recipe on a ViT-S: backbone, pool, classifier, loss over the global batch)
with AdamW, without clipping, on the same batches made beforehand; only what runs it differs. Bare DeepSpeed is
`engine(batch)`, `engine.backward`, `engine.step`; ours is the trainer's own step, with its metering, its vote on the
loss and its phases. All engines live in one process group and take rounds of a few steps in rotating order, so a
machine that drifts hits all alike; a ratio is the median over the rounds of the ratios within a round.

`ema_share` and `phases` come from the trainer's step with the `m3i` recipe and the same ViT-S.

The precision is that of the DeepSpeed files: in bf16, DDP runs under autocast and FSDP2 under its mixed precision.

    python benchmarks/scale.py --json
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
from _common import emit, machine, say
from deepspeed import initialize
from deepspeed.accelerator import get_accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import RunConfig, load_run
from m3i_scale.data.batch import Batch, synthetic_batch
from m3i_scale.data.stream import Account
from m3i_scale.engine.agree import max_over_ranks
from m3i_scale.engine.deepspeed.resolve import load_ds_config, resolve
from m3i_scale.engine.device import compute_dtype
from m3i_scale.engine.parameter_groups import parameter_groups
from m3i_scale.engine.partition import construct, full_shape, initialize_sharded
from m3i_scale.engine.process_group import start_ranks, stop_ranks
from m3i_scale.host.rank_record import PHASES
from m3i_scale.objective.build import build_objective, initialize_module
from m3i_scale.objective.information import Objective
from m3i_scale.objective.ranks import ProcessGroupRanks
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.data_supply import Fetcher
from m3i_scale.run.setup import ResolvedRun
from m3i_scale.run.train import start_trainer
from m3i_scale.run.trainer import Trainer

VOCABULARY, CAPTION = 30522, 32
LABEL_SETS = {"classes": [str(number) for number in range(1000)]}
Step = Callable[[], None]


class Premade:
    """Batches made beforehand, over and over, in place of a stream of shards."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.quarantined: dict[str, int] = {}
        self.samples_at_most = None
        self.account = Account(0, 0, 0)

    def stop_if_bad(self, account: Account, reasons: object = None, *, begun: bool = True) -> None:
        """Nothing is read, and so nothing can be bad."""

    def __iter__(self) -> Iterator[Batch]:
        return cycle(self.batches)


class Vocabulary:
    """Stands for a tokenizer where only its size is asked for."""

    def __len__(self) -> int:
        return VOCABULARY


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    ranks: int = typer.Option(2, help="Processes; one an accelerator."),
    rounds: int = 5,
    steps: int = typer.Option(2, help="Steps of an engine in a round."),
    batch: int = typer.Option(8, help="Images a rank."),
    image: int = 112,
    width: int = 384,
    depth: int = 12,
    zero1: str = "zero1_cpu_fp32",
    zero3: str = "zero3_cpu_fp32",
) -> None:
    """Print {ddp, …, ours_zero3: images/s, ratio_zero1, ratio_zero3, ema_share, phases, machine}."""
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *launcher, __file__, *sys.argv[1:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        emit(json.loads(done.stdout))  # rank 0 keeps its standard output for the document, too
        return
    group = start_ranks()
    sizes = {"image": image, "patch": 16, "width": width, "depth": depth, "batch": batch}
    with tempfile.TemporaryDirectory() as folder:
        plans = {name: _plan("supervised", file, sizes, group, folder) for name, file in _files(zero1, zero3)}
        engines = _engines(plans, group)
        document = _compare(engines, batch * group.world_size, rounds, steps, group.rank)
        engines.clear()
        gc.collect()
        document |= _phases(
            {name: _plan("m3i", f, sizes, group, folder) for name, f in _files(zero1, zero3)}, group, rounds
        )
    document |= {"sizes": sizes, "ranks": group.world_size, "backend": dist.get_backend(), "data": "premade batches"}
    document |= {"dtype": str(compute_dtype(plans["zero1"].deepspeed.config)).removeprefix("torch.")}
    document |= {"deepspeed": {"zero1": zero1, "zero3": zero3}, "threads": torch.get_num_threads()}
    document |= {"rounds": rounds, "steps": steps, "load": os.getloadavg()[0], "machine": machine()}
    stop_ranks(wait=True)
    if group.rank == 0:
        emit(document)


def _files(zero1: str, zero3: str) -> list[tuple[str, str]]:
    return [("zero1", zero1), ("zero3", zero3)]


# ---------------------------------------------------------------- one plan for all


def _plan(recipe: str, ds_file: str, sizes: dict[str, int], ranks: ProcessGroupRanks, folder: str) -> ResolvedRun:
    width, heads = sizes["width"], max(sizes["width"] // 64, 1)
    shape = f"hidden_size: {width}, num_attention_heads: {heads}, intermediate_size: {4 * width}"
    overrides = [
        "backbone.preset=null",
        f"backbone.config={{{shape}, num_hidden_layers: {sizes['depth']}, image_size: {sizes['image']}, "
        f"patch_size: {sizes['patch']}}}",
        f"optim.micro_batch_size={sizes['batch']}",
        f"optim.batch_size={sizes['batch'] * ranks.world_size}",
        "optim.clip_grad_norm=0",
        "hardware.peak_tflops=1",  # nothing here is told as a share of it
        "log.every_steps=1000000000",  # a logged step computes more
        f"output_dir={Path(folder)}",
    ]
    if recipe == "m3i":
        overrides += [
            f"text.config={{{shape}, num_hidden_layers: {sizes['depth'] // 2}}}",
            f"text.max_tokens={CAPTION}",
        ]
    run = load_run(recipe, overrides)
    optim = run.optim
    resolved = resolve(
        load_ds_config(ds_file),
        world_size=ranks.world_size,
        batch_size=optim.batch_size,
        micro_batch_size=optim.micro_batch_size,
        clip_grad_norm=optim.clip_grad_norm,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        hidden_size=width,
        where=ds_file,
    )
    parsed = parse_recipe(run.recipe)
    tokenizer: Any = Vocabulary() if parsed.uses_text else None
    return ResolvedRun(run, parsed, LABEL_SETS, tokenizer, backbone_config(run.backbone).image_size, resolved, 1)


def _batches(plan: ResolvedRun, rank: int) -> list[Batch]:
    """Four batches, others on every rank."""
    torch.manual_seed(rank)
    sizes = {"image": plan.image_size, "tokens": CAPTION, "classes": 1000, "vocabulary": VOCABULARY}
    return [synthetic_batch(plan.run.optim.micro_batch_size, plan.recipe.drawn_views, **sizes) for _ in range(4)]


# ---------------------------------------------------------------- engines


def _engines(plans: dict[str, ResolvedRun], ranks: ProcessGroupRanks) -> dict[str, Step]:
    return {
        "ddp": _ddp(plans["zero1"], ranks),
        "fsdp2": _fsdp2(plans["zero1"], ranks),
        "deepspeed_zero1": _bare_deepspeed(plans["zero1"], ranks),
        "ours_zero1": _ours(plans["zero1"], ranks)[0],
        "deepspeed_zero3": _bare_deepspeed(plans["zero3"], ranks),
        "ours_zero3": _ours(plans["zero3"], ranks)[0],
    }


def _objective(run: RunConfig, ranks: ProcessGroupRanks) -> Objective:
    objective = build_objective(run, LABEL_SETS, None, ranks)
    initialize_sharded(objective, initialize_module, seed=run.seed)
    return objective.to(get_accelerator().current_device_name())


def _torch_step(plan: ResolvedRun, model: Any, rank: int, precision: Callable[[], Any]) -> Step:
    """The plain loop of torch."""
    optim, device = plan.run.optim, get_accelerator().current_device_name()
    groups = parameter_groups(model, optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    batches = cycle(_batches(plan, rank))

    def step() -> None:
        batch = next(batches).to(device)
        optimizer.zero_grad()
        with precision():
            loss, _ = model(batch)
        loss.backward()
        optimizer.step()

    return step


def _ddp(plan: ResolvedRun, ranks: ProcessGroupRanks) -> Step:
    device, dtype = torch.device(get_accelerator().current_device_name()), compute_dtype(plan.deepspeed.config)
    devices = None if device.type == "cpu" else [device]
    model = DistributedDataParallel(_objective(plan.run, ranks), device_ids=devices, find_unused_parameters=False)
    low = dtype != torch.float32
    return _torch_step(
        plan, model, ranks.rank, lambda: torch.autocast(device.type, dtype) if low else contextlib.nullcontext()
    )


def _fsdp2(plan: ResolvedRun, ranks: ProcessGroupRanks) -> Step:
    device, dtype = get_accelerator().device_name(), compute_dtype(plan.deepspeed.config)
    mesh = torch.distributed.init_device_mesh(device, (ranks.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype if dtype != torch.float32 else None)
    model = _objective(plan.run, ranks)
    for layer in model.student.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return _torch_step(plan, model, ranks.rank, contextlib.nullcontext)


def _bare_deepspeed(plan: ResolvedRun, ranks: ProcessGroupRanks) -> Step:
    config, run = plan.deepspeed.config, plan.run
    module = construct(lambda: build_objective(run, LABEL_SETS, None, ranks), config)
    initialize_sharded(module, initialize_module, seed=run.seed)
    groups = parameter_groups(module, run.optim.weight_decay, shape_of=full_shape)
    engine, *_ = initialize(model=module, model_parameters=groups, config=config)
    batches, device = cycle(_batches(plan, ranks.rank)), get_accelerator().current_device_name()

    def step() -> None:
        loss, _ = engine(next(batches).to(device))
        engine.backward(loss)
        engine.step()

    return step


def _ours(plan: ResolvedRun, ranks: ProcessGroupRanks) -> tuple[Step, Trainer]:
    stream: Any = Premade(_batches(plan, ranks.rank))
    trainer = start_trainer(plan, ranks, [], None, stream)
    trainer.fetcher = Fetcher(iter(stream))
    trainer.hooks.remove(trainer.checkpointing)
    return trainer.train_step, trainer


# ---------------------------------------------------------------- measured


def _round_s(step: Step, steps: int) -> float:
    """Seconds of a step, of the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    get_accelerator().synchronize()
    return max_over_ranks({"s": (time.perf_counter() - started) / steps})["s"]


def _compare(engines: dict[str, Step], images: int, rounds: int, steps: int, rank: int) -> dict[str, Any]:
    names = list(engines)
    for name in names:
        _round_s(engines[name], 2)  # ZeRO-3 records its order of parameters in the first steps
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            seconds[name].append(_round_s(engines[name], steps))
        if rank == 0:
            say(f"round {number + 1}: " + ", ".join(f"{name} {images / seconds[name][-1]:.2f}" for name in names))
    document: dict[str, Any] = {name: images / statistics.median(values) for name, values in seconds.items()}
    for stage in ("zero1", "zero3"):
        pairs = zip(seconds[f"deepspeed_{stage}"], seconds[f"ours_{stage}"], strict=True)
        document[f"ratio_{stage}"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return document


def _phases(plans: dict[str, ResolvedRun], ranks: ProcessGroupRanks, rounds: int) -> dict[str, Any]:
    """Shares of a step of the whole recipe, by stage."""
    shares: dict[str, dict[str, float]] = {}
    for name, plan in plans.items():
        step, trainer = _ours(plan, ranks)
        _round_s(step, 2)
        trainer.step_times.reset()
        _round_s(step, rounds)
        found = trainer.step_times.shares()
        shares[name] = {phase: found[phase] for phase in PHASES}
        trainer.state.engine.destroy()
        del step, trainer
        gc.collect()
    return {"ema_share": {name: found["ema"] for name, found in shares.items()}, "phases": shares}


if __name__ == "__main__":
    typer.run(main)
