"""Counted FLOPs of one step of a recipe, on a batch that has everything a recipe can ask for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m3i_scale.config import RunConfig
from m3i_scale.data.batch import Batch
from m3i_scale.objective.build import build_objective, initialize_module
from m3i_scale.objective.information import Objective
from m3i_scale.scale.partition import initialize_sharded


def recipe_step(run: RunConfig, label_sets: dict[str, list[str]], vocabulary: int, batch: Batch) -> Callable[[], None]:
    """Forward and backward of a recipe on `batch`."""
    objective: Objective = build_objective(run, label_sets, vocabulary)
    initialize_sharded(objective, initialize_module, seed=0)

    def step() -> None:
        loss, _ = objective(batch)
        loss.backward()
        objective.zero_grad()

    return step


def synthetic_batch(count: int, views: int, *, image: int, tokens: int, classes: int, vocabulary: int) -> Batch:
    """Noise images, each with a category and a caption of its own of `tokens` tokens."""
    crops = torch.tensor([0.0, 0.0, image, image]).expand(views, count, 4)
    return Batch(
        images_VBCHW=torch.randint(0, 256, (views, count, 3, image, image), dtype=torch.uint8),
        crops_VB4=crops,
        flips_VB=torch.zeros(views, count, dtype=torch.bool),
        sizes_B2=torch.full((count, 2), float(image)),
        labels_B=torch.randint(0, classes, (count,)),
        label_sets_B=torch.zeros(count, dtype=torch.int64),
        text_ids_BT=torch.randint(5, vocabulary, (count, tokens)),
        text_mask_BT=torch.ones(count, tokens, dtype=torch.bool),
        has_text_B=torch.ones(count, dtype=torch.bool),
        captions_B=torch.arange(1, count + 1),
        seeds_B=torch.randint(0, 2**62, (count,)),
        keys=[str(number) for number in range(count)],
    )


def count_flop(step: Callable[[], None]) -> int:
    """FLOPs of one step, forward and backward; also warms up.

    Fused attention is counted by its matrix products, two forward and four backward: the counter has no formula for
    torch's fused CPU kernel and would take it for nothing.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
