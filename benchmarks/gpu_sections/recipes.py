"""What other recipes reach on ViT-B/16, where the host's time shows first, and what InternImage reaches."""

from __future__ import annotations

from functools import partial

import torch
from _gpu_steps import SMALL, Step, alone, our_step, seconds_of
from _rows import Rows

from m3i_scale.engine.peak import measured_peak
from m3i_scale.engine.process_group import start_ranks, stop_ranks

RECIPES = ("clip", "siglip", "mae", "moco", "barlow", "densecl", "supervised")
IMAGES = {"cuda": 256, "cpu": 8}
DEEPSPEED = {"cuda": "zero1_bf16", "cpu": "zero1_cpu_fp32"}
MAPS = {"cuda": "internimage-b", "cpu": "internimage-t"}


def measure(mode: str, rows: Rows) -> None:
    """Rows: that each runs; figures: milliseconds, images a second, MFU against the measured peak."""
    start_ranks()
    small = SMALL if mode == "cpu" else ("backbone.preset=vit-b/16",)
    peak = measured_peak(torch.bfloat16)
    cases = {recipe: (recipe, IMAGES[mode], small) for recipe in RECIPES}
    cases["supervised on InternImage"] = ("supervised", IMAGES[mode] // 4, (f"backbone.preset={MAPS[mode]}",))
    for name, (recipe, images, overrides) in cases.items():
        make = partial(our_step, recipe, DEEPSPEED[mode], images, *overrides)
        figures = alone(make, lambda step: _figures(step, peak.tflops))
        rows.must(name, "runs", "does not fit" if figures is None else "runs", ok=figures is not None)
        rows.figure(name, figures)
    stop_ranks(wait=True)


def _figures(step: Step, peak_tflops: float) -> dict[str, float]:
    seconds = seconds_of(step.call)
    mfu = step.tflop / seconds / peak_tflops
    return {"ms": seconds * 1e3, "images_per_s": step.images / seconds, "mfu": mfu}
