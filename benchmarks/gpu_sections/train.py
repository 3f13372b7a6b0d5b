"""Train, kill, resume, change the stage, export: what a user's first day holds, on one device."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path

import psutil
import torch
from _gpu_runs import Runs
from _rows import Rows
from _shards import TINY, make_shards

from m3i_scale.checkpoint.layout import step_name

STEPS, KILLED_AT, MORE_STEPS = 40, 25, 5
RUN = f"""
extends: m3i
name: gpu
{TINY}data: {{streams: 4}}
optim: {{batch_size: 16, micro_batch_size: 16, steps: {STEPS}, warmup_steps: 2, lr: 1.0e-3}}
checkpoint: {{every_steps: 8}}
log: {{every_steps: 1, progress: false}}
hardware: {{deterministic: true}}
"""
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
FILES = {
    "cuda": {"first": "zero1_bf16", "other stage": "zero3_bf16", "fp16": "zero3_fp16"},
    "cpu": {"first": "zero1_cpu_fp32", "other stage": "zero3_cpu_fp32"},
}


def measure(mode: str, rows: Rows) -> None:
    """Rows: equal losses after a kill, resumes under another stage and on the CPU, features of the export, no rest."""
    shared_before = set(os.listdir("/dev/shm"))
    files = FILES[mode]
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(Path(name), make_shards(Path(name)), RUN)
        runs.finish("whole", STEPS, files["first"])
        wanted = runs.losses("whole")
        finite = len(wanted) == STEPS and all(map(math.isfinite, wanted.values()))
        rows.must(f"{files['first']}: losses of {STEPS} steps", "finite", list(wanted.values()), ok=finite)
        rows.must("loss falls", f"< {wanted[1]:.4f}", wanted[STEPS], ok=wanted[STEPS] < wanted[1])
        rows.figure("killed after step", runs.kill("killed", KILLED_AT, STEPS, files["first"]))
        runs.finish("killed", STEPS, files["first"])
        worst = _worst(wanted, runs.losses("killed"))
        rows.at_most("losses after kill -9 and resume, relative", 0.0, worst)
        checkpoint = runs.folder / "whole" / "checkpoints" / step_name(STEPS)
        resumed = f"checkpoint.resume={checkpoint}"
        for kind in ("other stage", "fp16"):
            if kind in files:
                steps = STEPS + MORE_STEPS if kind == "other stage" else MORE_STEPS
                runs.finish(kind, steps, files[kind], *([resumed] if kind == "other stage" else []))
                losses = runs.losses(kind)
                finite = len(losses) == MORE_STEPS and all(map(math.isfinite, losses.values()))
                rows.must(f"{files[kind]}: losses of {MORE_STEPS} steps", "finite", list(losses.values()), ok=finite)
        if mode == "cuda":
            runs.finish("on the CPU", STEPS + 1, "zero1_cpu_fp32", resumed, **ON_CPU)
            losses = runs.losses("on the CPU")
            rows.must("a step on the CPU from this checkpoint", "finite", losses, ok=math.isfinite(losses[STEPS + 1]))
        runs.call("export", str(runs.folder / "whole"), "--output", str(runs.folder / "export"))
        on_cpu, on_device = runs.features("cpu"), runs.features(mode)
        cosine = _cosine(on_cpu, on_device)
        rows.must("stock features, cosine CPU : device", ">= 0.999", cosine, ok=cosine >= 0.999)
    left = [process.info["name"] for process in psutil.process_iter(["name"]) if _is_ours(process.pid)]
    rows.must("processes left", [], left, ok=not left)
    files_left = sorted(set(os.listdir("/dev/shm")) - shared_before)
    rows.must("files left in /dev/shm", [], files_left, ok=not files_left)


def _worst(wanted: dict[int, float], found: dict[int, float]) -> float:
    if wanted.keys() != found.keys():
        return math.inf
    return max(abs(found[step] - loss) / abs(loss) for step, loss in wanted.items())


def _cosine(one: list[list[float]], other: list[list[float]]) -> float:
    """The smallest of all images."""
    return float(torch.nn.functional.cosine_similarity(torch.tensor(one), torch.tensor(other)).min())


def _is_ours(process: int) -> bool:
    """Whether another process is of this section's session, whoever its parent is now."""
    with contextlib.suppress(ProcessLookupError):
        return process != os.getpid() and os.getsid(process) == os.getsid(0)
    return False
