"""What share of the card a step of ViT-g/14 reaches, beside open_clip's and a loop like DINOv3's, in one run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _gpu_steps import SMALL, Step, Tower, alone, dino_like_step, open_clip_step, our_step, seconds_of
from _rows import Rows
from deepspeed.accelerator import get_accelerator
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from m3i_scale.engine.peak import measured_peak
from m3i_scale.engine.process_group import start_ranks, stop_ranks

GOAL = 0.45
IMAGES = {"cuda": 64, "cpu": 8}
TOWERS = {
    "cuda": Tower(image=224, patch=14, width=1408, depth=40, heads=16, hidden=6144),
    "cpu": Tower(image=32, patch=8, width=64, depth=2, heads=2, hidden=128),
}
ZERO1, ZERO3 = {"cuda": "zero1_bf16", "cpu": "zero1_cpu_fp32"}, {"cuda": "zero3_bf16", "cpu": "zero3_cpu"}
NONE, FULL, COMPILED = (
    "backbone.activation_checkpointing=none",
    "backbone.activation_checkpointing=full",
    "backbone.compile=true",
)
OURS, PEER = "m3i, ZeRO-1, compiled", "a loop like DINOv3's, compiled"


def measure(mode: str, rows: Rows) -> None:
    """Rows: the goal, and ours against the loop, by counted FLOP. On a CPU only that every side runs."""
    start_ranks()
    images, small, tower = IMAGES[mode], SMALL if mode == "cpu" else (), TOWERS[mode]
    ours = partial(our_step, "m3i_vit_g14")
    sides: dict[str, Callable[[], Step]] = {
        "m3i, ZeRO-1, everything recomputed": lambda: ours(ZERO1[mode], images, FULL, *small),
        "m3i, ZeRO-1": lambda: ours(ZERO1[mode], images, NONE, *small),
        OURS: lambda: ours(ZERO1[mode], images, NONE, COMPILED, *small),
        "m3i, ZeRO-3": lambda: ours(ZERO3[mode], images, NONE, *small),
        "open_clip": lambda: open_clip_step(tower, images, compiled=False),
        "open_clip, compiled": lambda: open_clip_step(tower, images, compiled=True),
        PEER: lambda: dino_like_step(tower, images, compiled=True),
    }
    peak = measured_peak(torch.bfloat16)
    rows.figure("peak, TFLOP/s", {"taken": peak.tflops, "from": peak.source})
    rows.figure("peak of the data sheet, TFLOP/s", peak.data_sheet_tflops)
    rates = {}
    for name, make in sides.items():
        figures = alone(make, lambda step: _figures(step, peak.tflops, mode))
        rows.figure(name, figures or "does not fit")
        if figures is not None:
            rates[name] = figures["tflop_per_s"]
            if "compiled" in name:
                rows.must(f"{name}: graphs", "> 0", figures["graphs"], ok=figures["graphs"] > 0)
    if mode == "cuda":
        reached = rates.get(OURS, 0.0)
        rows.must(
            "MFU of the compiled step, of the measured peak",
            f">= {GOAL}",
            found := reached / peak.tflops,
            ok=found >= GOAL,
        )
        ratio = reached / rates[PEER] if PEER in rates else 0.0
        rows.must("counted FLOP/s, ours : the loop", ">= 1", ratio, ok=ratio >= 1)
    else:
        rows.must("every side runs", sorted(sides), sorted(rates), ok=rates.keys() == sides.keys())
    stop_ranks(wait=True)


def _figures(step: Step, peak_tflops: float, mode: str) -> dict[str, Any]:
    seconds = seconds_of(step.call)
    graphs = counters["stats"]["unique_graphs"]
    counters.clear()
    return {
        "ms": seconds * 1e3,
        "images_per_s": step.images / seconds,
        "tflop_per_image": step.tflop / step.images,
        "tflop_per_s": step.tflop / seconds,
        "mfu": step.tflop / seconds / peak_tflops,
        "graphs": graphs,
        "device_idle": _idle(step) if mode == "cuda" else None,
        "memory_gib": get_accelerator().max_memory_allocated() / 2**30,
    }


def _idle(step: Step) -> float:
    """The share of three steps in which no kernel runs, as the profiler sees them on one stream."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        seconds = _timed(step, 3)
    busy_us = sum(event.self_device_time_total for event in seen.key_averages())
    return max(0.0, 1.0 - busy_us * 1e-6 / seconds)


def _timed(step: Step, count: int) -> float:
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(count):
        step.call()
    ended.record()
    get_accelerator().synchronize()
    return started.elapsed_time(ended) / 1e3
