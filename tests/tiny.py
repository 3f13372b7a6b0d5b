"""Models of 64 channels and two layers on images of 32 pixels, and batches for them."""

from __future__ import annotations

from typing import Any

import torch

from m3i_scale.config import RunConfig, load_run
from m3i_scale.data.batch import Batch
from m3i_scale.objective.build import build_objective, initialize_module, momentum_pairs
from m3i_scale.objective.information import Objective
from m3i_scale.scale.ds_config import load_ds_config
from m3i_scale.scale.partition import initialize_sharded

SMALL_BUCKETS = {
    "reduce_bucket_size": 4_096,
    "stage3_prefetch_bucket_size": 3_686,
    "stage3_max_live_parameters": 65_536,
    "stage3_max_reuse_distance": 65_536,
    "sub_group_size": 32_768,
}
"""So small that even these models are gathered, released, reduced and updated in parts."""
LABEL_SETS = {"shapes": ["disc", "square", "cross"], "colours": ["red", "blue"]}
VOCABULARY = 50
GRID = (4, 4)

_BACKBONE = (
    "backbone.preset=vit-ti/16",
    "backbone.config={hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128, "
    "image_size: 32, patch_size: 8}",
)
_TEXT = (
    "text.config={hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128}",
    "text.max_tokens=16",
)
OVERRIDES = {
    "clip": (*_TEXT, "recipe.targets.0.width=32"),
    "mae": ("recipe.decoders.pixels.width=32", "recipe.decoders.pixels.heads=2", "recipe.decoders.pixels.depth=1"),
    "sim": ("recipe.decoders.dense.depth=1",),
    "m3i": (*_TEXT, "recipe.decoders.dense.depth=1", "recipe.decoders.pool.width=64", "recipe.targets.2.width=32"),
    "supervised": (),
}
RECIPES = tuple(OVERRIDES)


def in_parts(ds_config: str) -> dict[str, Any]:
    """A built-in DeepSpeed file with small buckets."""
    raw = load_ds_config(ds_config)
    zero = raw["zero_optimization"]
    return raw | {"zero_optimization": zero | {key: value for key, value in SMALL_BUCKETS.items() if key in zero}}


def tiny_overrides(recipe: str) -> list[str]:
    return [*_BACKBONE, *OVERRIDES[recipe]]


def tiny_run(recipe: str, *overrides: str) -> RunConfig:
    return load_run(recipe, [*tiny_overrides(recipe), "optim.micro_batch_size=4", *overrides])


def tiny_objective(recipe: str, *overrides: str, seed: int = 0) -> Objective:
    """Initialised, in fp32; the momentum target holds the first weights of the backbone."""
    run = tiny_run(recipe, *overrides)
    objective = build_objective(run, LABEL_SETS, VOCABULARY if "text" in run.model_fields_set else None)
    initialize_sharded(objective, initialize_module, seed=seed, skip="momentum.")
    named = dict(objective.named_parameters())
    with torch.no_grad():
        for online, target in momentum_pairs(objective):
            named[target].copy_(named[online])
    return objective


def random_batch(
    size: int, *, seed: int = 0, views: int = 2, text: bool = True, labels: bool = True, repeated_caption: bool = True
) -> Batch:
    """Noise images with geometry; every third sample lacks a caption, every fourth a category. Sample 6 repeats the
    caption of sample 1, so that among eight samples on two ranks the repetition lies on the other rank."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(size)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    has_text = (number % 3 != 2) if text else torch.zeros(size, dtype=torch.bool)
    has_label = (number % 4 != 3) if labels else torch.zeros(size, dtype=torch.bool)
    sets = torch.where(has_label, number % 2, -1)
    lengths = torch.randint(2, 9, (size,), generator=generator)
    mask = (torch.arange(8) < lengths[:, None]) & has_text[:, None]
    mask[:, 0] = True
    captions = torch.where(has_text, number * 7919 + 1, 0)
    ids = torch.randint(5, VOCABULARY, (size, 8), generator=generator) * mask
    if size > 6 and repeated_caption:
        for column in (captions, ids, mask):
            column[6] = column[1]
    return Batch(
        images_VBCHW=torch.randint(0, 256, (views, size, 3, 32, 32), generator=generator, dtype=torch.uint8),
        crops_VB4=torch.cat([uniform(0, 20, views, size, 2), uniform(20, 40, views, size, 2)], dim=-1),
        flips_VB=torch.rand(views, size, generator=generator) < 0.5,
        sizes_B2=torch.full((size, 2), 64.0),
        labels_B=torch.where(has_label, number % 2, -1),
        label_sets_B=sets,
        text_ids_BT=ids,
        text_mask_BT=mask,
        has_text_B=has_text,
        captions_B=captions,
        seeds_B=torch.randint(0, 2**62, (size,), generator=generator),
        keys=[f"k{int(n)}" for n in number],
    )


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Samples start … stop−1 of a batch."""
    fields = {name: value[:, start:stop] if "_VB" in name else value[start:stop] for name, value in vars(batch).items()}
    return Batch(**fields)
