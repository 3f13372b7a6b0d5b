"""What ViT-g/14 takes on the device, beside what `m3i-scale plan` says of the same step."""

from __future__ import annotations

import statistics
from functools import partial

from _gpu_steps import LABEL_SETS, SMALL, TOKENS, VOCABULARY, alone, our_step
from _rows import Rows
from deepspeed.accelerator import get_accelerator

from m3i_scale.config import load_run
from m3i_scale.engine.process_group import start_ranks, stop_ranks
from m3i_scale.plan.planning import ACCELERATOR_WORKSPACE_GIB, Choice, Machine, Model, Vocabulary, estimate
from m3i_scale.plan.timing import Links
from m3i_scale.text import GIB

CASES = {
    "cuda": [("none", 16), ("none", 32), ("none", 64), ("every_2", 64), ("full", 64), ("full", 96)],
    "cpu": [("none", 4), ("full", 8)],
}
DEEPSPEED = {"cuda": "zero1_bf16", "cpu": "zero1_cpu_fp32"}
MEDIAN, WORST = 0.07, 0.15


def measure(mode: str, rows: Rows) -> None:
    """Rows: median and worst error of the plan, and that only what the plan refuses does not fit."""
    start_ranks()
    small, accelerator = SMALL if mode == "cpu" else (), get_accelerator()
    room_gib = accelerator.total_memory() / GIB
    errors, surprises = [], []
    for policy, images in CASES[mode]:
        name = f"{policy}, {images} images"
        overrides = [*small, f"backbone.activation_checkpointing={policy}"]
        planned_gib = _planned_gib(DEEPSPEED[mode], policy, images, overrides, room_gib)
        make = partial(our_step, "m3i_vit_g14", DEEPSPEED[mode], images, *overrides)
        measured_gib = alone(make, lambda _: accelerator.max_memory_allocated() / GIB)
        rows.figure(name, {"planned_gib": planned_gib, "measured_gib": measured_gib})
        if measured_gib is not None:
            errors.append(abs((planned_gib - ACCELERATOR_WORKSPACE_GIB) / measured_gib - 1))
        elif planned_gib <= room_gib:
            surprises.append(name)
    rows.must("fits in the plan and not on the device", [], surprises, ok=not surprises)
    if (
        mode == "cuda" and errors
    ):  # on a CPU the process's whole memory is what the accelerator tells: see plan_error.py
        rows.at_most("median error of the plan", MEDIAN, statistics.median(errors))
        rows.at_most("worst error of the plan", WORST, max(errors))
    stop_ranks(wait=True)


def _planned_gib(deepspeed: str, policy: str, images: int, overrides: list[str], room_gib: float) -> float:
    """The peak of a step, workspace included."""
    sizes = [f"optim.batch_size={images}", f"optim.micro_batch_size={images}", f"text.max_tokens={TOKENS}"]
    run = load_run("m3i_vit_g14", [*overrides, *sizes, f"deepspeed={deepspeed}"])
    rates = {"fp32": 1.0, "bf16": 1.0, "fp16": 1.0}
    on_host = get_accelerator().device_name() == "cpu"
    machine = Machine("this", Links(1, 1, 1.0, 1.0, 1.0), room_gib, rates, 1.0, on_host, ACCELERATOR_WORKSPACE_GIB)
    precision = "fp32" if deepspeed.endswith("fp32") else "bf16"
    model = Model(run, Vocabulary(LABEL_SETS, VOCABULARY, ()), 1, precision)
    return estimate(model, machine, Choice(deepspeed, policy, images)).peak_bytes / GIB
