"""One case of `host_time.py`, in a process of its own: rank 0 of many, whose collectives do nothing."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed.comm.torch
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.testing._internal.distributed.fake_pg import FakeStore

from m3i_scale.config import load_run
from m3i_scale.data.batch import synthetic_batch
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.engine.engine import take_step
from m3i_scale.objective.ranks import ProcessGroupRanks
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.setup import ResolvedRun, resolve_engine, start_engine

WIDTH, REAL_WIDTH = 64, 1408
"""These are the widths of the backbone that is measured, and of ViT-g/14, which it stands for."""
MICRO_BATCH, RANKS_PER_NODE = 4, 8
WARM_UP = 3
"""Steps before those that are measured: DeepSpeed records the order of modules in the second."""
TEXT_TOKENS, VOCABULARY, LABEL_SETS = 16, 50, {"classes": [str(number) for number in range(5)]}
_SIZES = f"hidden_size: {WIDTH}, num_attention_heads: 2, intermediate_size: {2 * WIDTH}"


def overrides(ranks: int) -> list[str]:
    """Return settings of `m3i` with as many layers as at a billion parameters, and next to no arithmetic."""
    return [
        f"backbone.config={{{_SIZES}, num_hidden_layers: 40, image_size: 32, patch_size: 8}}",
        f"text.config={{{_SIZES}, num_hidden_layers: 12}}",
        f"text.max_tokens={TEXT_TOKENS}",
        *(f"recipe.decoders.dense.{field}" for field in (f"width={WIDTH}", "heads=2", "depth=4")),
        f"recipe.targets.2.width={WIDTH}",
        f"optim.micro_batch_size={MICRO_BATCH}",
        f"optim.batch_size={MICRO_BATCH * ranks}",
    ]


def scaled(zero: dict[str, Any]) -> dict[str, Any]:
    """Return sizes that make as many collectives of this model as they make of ViT-g/14."""
    by_layer = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters")
    by_layer += ("stage3_max_reuse_distance", "sub_group_size", "allgather_bucket_size")
    small = {key: zero[key] * WIDTH**2 // REAL_WIDTH**2 // 2 * 2 for key in by_layer if key in zero}
    if "stage3_param_persistence_threshold" in zero:
        small["stage3_param_persistence_threshold"] = min(10 * WIDTH, zero["stage3_param_persistence_threshold"])
    return zero | small


def start(ranks: int) -> None:
    """Join a group of so many ranks, of which there is one."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), LOCAL_SIZE=str(RANKS_PER_NODE))
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())  # type: ignore[no-untyped-call]
    deepspeed.comm.torch.build_shm_op = lambda: None  # else it would wait for the others in shared memory
    accelerator = type(get_accelerator())
    build = accelerator.create_op_builder
    accelerator.create_op_builder = lambda self, name: None if name == "ShareMemCommBuilder" else build(self, name)
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)


def measure(file: Path, ranks: int, steps: int) -> dict[str, float]:
    """Return milliseconds of processor time by phase, medians over `steps`."""
    start(ranks)
    run = load_run("m3i", [*overrides(ranks), f"deepspeed={file}"])
    resolved = resolve_engine(run, ranks, REAL_WIDTH)
    resolved.config["zero_optimization"] = scaled(resolved.config["zero_optimization"])
    recipe = parse_recipe(run.recipe)
    image_size = 32
    engine, ema = start_engine(
        ResolvedRun(run, recipe, LABEL_SETS, range(VOCABULARY), image_size, resolved, 1),  # type: ignore[arg-type]
        ProcessGroupRanks(),
    )
    batch = synthetic_batch(
        MICRO_BATCH,
        recipe.drawn_views,
        image=image_size,
        tokens=TEXT_TOKENS,
        classes=len(LABEL_SETS["classes"]),
        vocabulary=VOCABULARY,
        reads=recipe.reads,
    )
    phases: dict[str, list[float]] = {"forward": [], "backward": [], "step": [], "momentum": []}
    for step in range(WARM_UP + steps):
        times = [time.process_time()]
        loss, _ = engine(batch)
        times.append(time.process_time())
        engine.backward(loss)
        times.append(time.process_time())
        take_step(engine)
        times.append(time.process_time())
        ema.update(1.0)
        times.append(time.process_time())
        if step >= WARM_UP:
            for phase, begun, ended in zip(phases, times, times[1:], strict=False):
                phases[phase].append(1e3 * (ended - begun))
    return {phase: statistics.median(values) for phase, values in phases.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    case = json.loads(sys.argv[1])
    written = Path(sys.argv[2])
    raw = load_ds_config(case["deepspeed"])
    raw["zero_optimization"] |= case["settings"]
    file = written.with_name("deepspeed.json")
    file.write_text(json.dumps(raw))
    written.write_text(json.dumps(measure(file, case["ranks"], case["steps"])))
