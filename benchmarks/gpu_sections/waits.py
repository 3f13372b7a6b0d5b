"""How often the host waits for the device in a step that is not logged: each wait drains the queue of kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _gpu_steps import SMALL
from _rows import Rows
from _shards import make_shards
from fake_library import build
from tiny import random_batch, tiny_objective
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.cpp_extension import library_paths
from traffic_cases import Sizes

from m3i_scale.objective.ranks import ProcessGroupRanks

BOUND = 2
"""Under ZeRO-1: the vote of all ranks, and DeepSpeed's look at the norm of the gradients."""
WALKED = {"m3i": 0, "clip": 0, "siglip": 0, "mae": 0, "moco": 0, "supervised": 0}
"""Waits in forward and backward pass, which is all that a walk with fake tensors can see."""
COLLECTIVES = {"m3i": (29, 9), "clip": (8, 6), "supervised": (7, 1), "mae": (1, 1), "moco": (3, 2)}
"""Of forward and backward pass on several ranks, beside DeepSpeed's: before counts and sums were joined, and now."""
FAKE_CUDA = Path(__file__).resolve().parents[2] / "tests" / "fake_cuda"


def measure(mode: str, rows: Rows) -> None:
    """Rows: waits of a step on a GPU; on a fake one, those of a simulated step, of the objectives, and collectives."""
    if mode == "fake":
        _walk(rows)
        _simulate(rows)
        _collectives(rows)
    else:
        _train(rows)


def _walk(rows: Rows) -> None:
    models = _on_fake_device("walk.py", *WALKED)["models"]
    for name, bound in WALKED.items():
        rows.at_most(f"{name}: host waits of a micro-batch", bound, sum(models[name]["waits"].values()))
        rows.figure(f"{name}: kernels of a micro-batch", models[name]["kernels"])


def _simulate(rows: Rows) -> None:
    """Simulate a run with its engine, and count in its last step, before the record is written."""
    answer = _on_fake_device("simulate.py", "m3i")["m3i"]
    step = answer["steps"][-1]
    rows.at_most("m3i: host waits of a step", BOUND, sum(step["waits"].values()))
    rows.must("m3i: races, lifetimes and devices", {}, answer["faults"], ok=not answer["faults"])
    rows.figure("m3i: kernels of a step with its engine", step["kernels"])
    rows.figure("waits by place", step["waits"])


def _on_fake_device(script: str, *arguments: str) -> dict[str, Any]:
    """Return what a script of `tests/fake_cuda` prints."""
    preloaded = {"LD_PRELOAD": str(build()), "LD_LIBRARY_PATH": os.pathsep.join(library_paths())}
    command = [sys.executable, str(FAKE_CUDA / script), *arguments]
    done = subprocess.run(command, env=os.environ | preloaded, stdout=subprocess.PIPE, text=True, check=True)
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def _collectives(rows: Rows) -> None:
    """Count on rank 0 of two whose process group does nothing: what the numbers become does not matter."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())  # type: ignore[no-untyped-call]
    for name, (before, bound) in COLLECTIVES.items():
        objective = tiny_objective(name)
        for module in objective.modules():
            if hasattr(module, "ranks"):
                module.ranks = ProcessGroupRanks()
        with Sizes(least_bytes=0) as seen:
            objective(random_batch(4))[0].backward()
        rows.at_most(f"{name}: collectives of a micro-batch on several ranks", bound, seen.calls.total())
        rows.figure(f"{name}: collectives before they were joined", before)
    dist.destroy_process_group()


def _train(rows: Rows) -> None:
    from m3i_scale.config import load_run
    from m3i_scale.engine.process_group import start_ranks, stop_ranks
    from m3i_scale.run.check import resolve_run
    from m3i_scale.run.hooks import Hook
    from m3i_scale.run.train import start_trainer

    class Watch(Hook):
        """Has torch warn of every wait, after the fourth step and until the seventh is over."""

        def post_step(self) -> bool:
            torch.cuda.set_sync_debug_mode("warn" if 4 <= trainer.state.step < 7 else "default")
            return False

    with tempfile.TemporaryDirectory() as name:
        shards = make_shards(Path(name))
        sizes = ["optim.batch_size=8", "optim.micro_batch_size=8", "optim.steps=8", "optim.warmup_steps=1"]
        places = [f"data.datasets.shapes.path={shards}", f"output_dir={name}/run", "deepspeed=zero1_bf16"]
        logs = ["log.every_steps=100", "log.progress=false", "checkpoint.every_steps=100", "data.streams=4"]
        run = load_run("m3i", [*SMALL, *sizes, *places, *logs])
        trainer = start_trainer(resolve_run(run, 1), start_ranks(), [], None)
        trainer.hooks = [hook for hook in trainer.hooks if hook is not trainer.checkpointing] + [Watch()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit()
        stop_ranks(wait=True)
    steps = 3  # the fifth to the seventh; the eighth and last one is logged
    waits = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    rows.figure("waits by place", dict(Counter(waits).most_common()))
    rows.at_most("m3i: host waits of a step that is not logged", BOUND, len(waits) / steps)
