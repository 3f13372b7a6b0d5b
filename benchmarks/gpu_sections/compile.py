"""Compiled layers train like eager ones: the same losses and gradients, up to rounding, in fp32 and bf16."""

from __future__ import annotations

import copy
import math

import torch
from _rows import Rows
from deepspeed.accelerator import get_accelerator
from tiny import random_batch, tiny_objective

from m3i_scale.engine.compilation import check_compile, compile_layers
from m3i_scale.engine.device import allow_tf32
from m3i_scale.objective.information import Objective

RECIPES = ("m3i", "clip")
BATCH, STEPS, LR = 8, 5, 0.05
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Tolerances of the relative difference of a loss. In fp32 it includes the rounding of earlier steps."""


def measure(mode: str, rows: Rows) -> None:
    """Rows: that the compiler has what it needs, and the largest difference of a loss over some steps of SGD."""
    device = get_accelerator().current_device_name()
    allow_tf32(torch.float32)
    check_compile()
    rows.must("compiler, Python.h, Triton", "installed", "installed", ok=True)
    for recipe in RECIPES:
        for dtype, bound in BOUNDS.items():
            eager = tiny_objective(recipe).to(device, dtype)
            compiled = copy.deepcopy(eager)
            rows.figure(f"{recipe}: compiled layers", len(compile_layers(compiled)))
            pairs = list(zip(_losses(eager, device), _losses(compiled, device), strict=True))
            worst = max(abs(ours - wanted) / abs(wanted) for wanted, ours in pairs)
            finite = all(map(math.isfinite, (loss for pair in pairs for loss in pair)))
            name = f"{recipe}, {str(dtype).removeprefix('torch.')}: losses of {STEPS} steps, relative"
            rows.at_most(name, bound, worst if finite else math.nan)
            rows.figure(f"{name}: from, to", (pairs[0][0], pairs[-1][0]))


def _losses(objective: Objective, device: str) -> list[float]:
    objective.train()
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=LR)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        loss, _ = objective(random_batch(BATCH, seed=step).to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_backward()
        losses.append(float(loss.detach()))
    return losses
