"""Every recipe on the device computes what it does on the CPU: loss and all gradients, masks to the bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from _rows import Rows
from deepspeed.accelerator import get_accelerator
from tiny import DINOV2, MAPS, RECIPES, first_weights, random_batch, tiny_objective
from torch import Tensor

from m3i_scale.engine.device import allow_tf32
from m3i_scale.objective.information import Objective
from m3i_scale.objective.masks import BlockMask, RandomMask

BATCH = 8
LOSS, GRADIENT, LOW_PRECISION = 1e-5, 1e-4, 2e-2
SCALE = 2.0**10
"""Of losses in fp16; one of 65536 overflows in recipes with logits, and loss scaling would halve it."""
MASKS = 10_000


def measure(mode: str, rows: Rows) -> None:
    """Rows: loss and gradients of every recipe and backbone family in fp32, the loss in bf16, fp16 finite, masks, first
    values."""
    device = get_accelerator().current_device_name()
    allow_tf32(torch.float32)
    pairs = zip(tiny_objective("m3i").parameters(), _drawn_on(device), strict=True)
    same = all(torch.equal(wanted, found.cpu()) for wanted, found in pairs)
    rows.must("first values of m3i", "the same bits", "the same" if same else "others", ok=same)
    for name, mask in (("random", RandomMask()), ("block", BlockMask())):
        seeds = torch.arange(MASKS) * 7919
        same = torch.equal(mask.order(seeds, (14, 14), 0), mask.order(seeds.to(device), (14, 14), 0).cpu())
        rows.must(f"{name} masks of {MASKS} seeds", "the same bits", "the same" if same else "others", ok=same)
    cases = [(recipe, recipe, (), 32) for recipe in RECIPES]
    cases += [
        ("m3i on DINOv2", "m3i", DINOV2, 32),
        ("m3i on InternImage", "m3i", (*MAPS, "backbone.attention=across_images"), 64),
    ]
    for name, recipe, overrides, image in cases:
        objective = tiny_objective(recipe, *overrides)
        _gradients(objective, random_batch(BATCH, seed=1, image=image))  # fills queues and centers
        objective.after_backward()
        objective.zero_grad()
        _compare(name, objective, random_batch(BATCH, image=image), device, mode, rows)


def _drawn_on(device: str) -> list[Tensor]:
    """Return the first values of m3i that are drawn into a model on the device."""
    objective = tiny_objective("m3i", seed=1).to(device)
    first_weights(objective, seed=0)
    return list(objective.parameters())


def _compare(name: str, objective: Objective, batch: Any, device: str, mode: str, rows: Rows) -> None:
    wanted_loss, wanted = _gradients(copy.deepcopy(objective), batch)
    there = batch.to(device)
    found_loss, found = _gradients(copy.deepcopy(objective).to(device), there)
    rows.at_most(f"{name}: loss, relative", LOSS, abs(found_loss - wanted_loss) / abs(wanted_loss))
    rows.at_most(f"{name}: worst gradient, relative to its norm", GRADIENT, _worst(wanted, found))
    again_loss, again = _gradients(copy.deepcopy(objective).to(device), there)
    rows.figure(f"{name}: a second time, worst gradient", _worst(found, again) + abs(again_loss - found_loss))
    low_loss, _ = _gradients(copy.deepcopy(objective).to(device).bfloat16(), there)
    rows.at_most(f"{name}: loss in bf16, relative", LOW_PRECISION, abs(low_loss - wanted_loss) / abs(wanted_loss))
    if mode == "cuda":
        _, half = _gradients(copy.deepcopy(objective).to(device).half(), there, scale=SCALE)
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in half.values())
        rows.must(f"{name}: gradients in fp16 times {SCALE:g}", "finite", "finite" if finite else "not", ok=finite)


def _gradients(objective: Objective, batch: Any, scale: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter that has one."""
    objective.train()
    torch.manual_seed(0)
    loss, _ = objective(batch)
    (loss * scale).backward()
    found = {name: p.grad.float().cpu() for name, p in objective.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def _worst(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """The largest difference of a parameter's gradient, as a share of its norm, or of the whole's where it is small."""
    if wanted.keys() != found.keys():
        return math.inf
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    floors = {name: max(float(gradient.norm()), 1e-3 * float(whole)) for name, gradient in wanted.items()}
    return max(float((wanted[name] - found[name]).norm()) / floors[name] for name in wanted)
