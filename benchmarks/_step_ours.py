"""Our side of step.py: a recipe's complete engine step, with the EMA update of its teacher, as in a training run."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from _step_peers import (
    BETAS,
    CLASSES,
    CLIP,
    CONTEXT,
    DINOV2,
    EMA_DECAY,
    EPS,
    HEAD,
    LR,
    MAE,
    SIGLIP,
    SIGLIP_CONTEXT,
    SIGLIP_VOCABULARY,
    SMOOTHING,
    SUPERVISED,
    TEACHER_TEMPERATURE,
    VOCABULARY,
    WEIGHT_DECAY,
    Side,
)
from deepspeed.accelerator import get_accelerator

from m3i_scale.config import RunConfig, load_run
from m3i_scale.data.batch import Batch, synthetic_batch
from m3i_scale.engine.averages import ShardedEma
from m3i_scale.engine.compilation import compile_layers
from m3i_scale.engine.deepspeed.effective import check_effective
from m3i_scale.engine.deepspeed.resolve import load_ds_config, resolve
from m3i_scale.engine.engine import build_engine, spread_nonfinite, take_step, undone_if_skipped
from m3i_scale.engine.partition import full_shape, initialize_sharded
from m3i_scale.objective.build import build_objective, ema_pairs, initialize_module
from m3i_scale.objective.information import Objective
from m3i_scale.objective.inputs import build_inputs
from m3i_scale.objective.recipe import parse_recipe


def _batch(run: RunConfig, sizes: dict[str, int], tokens: torch.Tensor | None = None) -> Batch:
    """Return random images with captions, without the columns that are padding in all rows."""
    views = parse_recipe(run.recipe).drawn_views
    batch = synthetic_batch(
        sizes["batch"], views, image=sizes["image"], tokens=1, classes=CLASSES, vocabulary=VOCABULARY
    )
    if tokens is None:
        return batch
    used = tokens[:, (tokens != 0).any(dim=0)]
    return replace(batch, text_ids_BT=used, text_mask_BT=used != 0)


def _our_step(run: RunConfig, deepspeed: str, batch: Batch, *, vocabulary: int | None = None, classes: int = 0) -> Side:
    resolved = resolve(
        load_ds_config(deepspeed),
        world_size=1,
        batch_size=len(batch),
        micro_batch_size=len(batch),
        clip_grad_norm=0.0,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        hidden_size=384,
        where=deepspeed,
    )
    label_sets = {"classes": [str(number) for number in range(classes)]} if classes else {}

    def build() -> Objective:
        objective = build_objective(run, label_sets, vocabulary)
        if run.backbone.compiles:
            compile_layers(objective)
        return objective

    engine = build_engine(
        build,
        lambda module: initialize_sharded(module, initialize_module, seed=0),
        resolved.config,
        weight_decay=WEIGHT_DECAY,
    )
    check_effective(engine, resolved)
    pairs = ema_pairs(engine.module)
    ema = ShardedEma(engine, pairs) if pairs else None
    on_device = batch.to(get_accelerator().current_device_name())
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]

    def step() -> None:
        with undone_if_skipped(engine, engine.module):
            loss, _ = engine(on_device)
            engine.backward(spread_nonfinite(loss))
            take_step(engine)
        if ema is not None:
            ema.update(EMA_DECAY)

    return Side(step, sum(math.prod(full_shape(parameter)) for parameter in trained))


def _backbone(sizes: dict[str, int], mlp: str = "intermediate_size", ratio: int | None = None) -> str:
    fields = (
        f"image_size: {sizes['image']}, patch_size: {sizes['patch']}, hidden_size: {sizes['width']}, "
        f"num_hidden_layers: {sizes['depth']}, num_attention_heads: {sizes['heads']}, "
        f"{mlp}: {ratio or 4 * sizes['width']}"
    )
    return f"backbone.config={{{fields}}}"


def _text(sizes: dict[str, int], fields: str) -> str:
    return (
        f"text.config={{hidden_size: {sizes['width']}, num_hidden_layers: {sizes['depth']}, "
        f"num_attention_heads: {sizes['heads']}, intermediate_size: {4 * sizes['width']}, {fields}}}"
    )


def our_clip_step(deepspeed: str, tokens: torch.Tensor, *options: str) -> Side:
    text = _text(CLIP, "hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0")
    overrides = [_backbone(CLIP), text, f"text.max_tokens={CONTEXT}", f"recipe.targets.0.width={CLIP['width']}"]
    run = load_run("clip", [*overrides, *options])
    return _our_step(run, deepspeed, _batch(run, CLIP, tokens), vocabulary=VOCABULARY)


def our_mae_step(deepspeed: str, *options: str) -> Side:
    run = load_run("mae", [_backbone(MAE), *options])
    return _our_step(run, deepspeed, _batch(run, MAE))


def our_siglip_step(deepspeed: str, tokens: torch.Tensor) -> Side:
    overrides = [_backbone(SIGLIP), _text(SIGLIP, "attention_dropout: 0.0"), f"text.max_tokens={SIGLIP_CONTEXT}"]
    run = load_run("siglip", overrides)
    return _our_step(run, deepspeed, _batch(run, SIGLIP, tokens), vocabulary=SIGLIP_VOCABULARY)


def our_supervised_step(deepspeed: str, labels: torch.Tensor) -> Side:
    smoothing = f"recipe.targets.0.distribution.label_smoothing={SMOOTHING}"
    run = load_run("supervised", [_backbone(SUPERVISED), "recipe.decoders.pool={kind: class_token}", smoothing])
    batch = replace(_batch(run, SUPERVISED), labels_B=labels)
    return _our_step(run, deepspeed, batch, classes=CLASSES)


def our_dinov2_step(deepspeed: str, *options: str) -> Side:
    head = f"{{depth: 3, hidden: {HEAD['hidden']}, width: {HEAD['bottleneck']}, norm: none, "
    head += f"prototypes: {HEAD['prototypes']}}}"
    centering = f"{{kind: centering, target_temperature: {TEACHER_TEMPERATURE}}}"
    overrides = [_backbone(DINOV2, "mlp_ratio", 4), "backbone.preset=dinov2-s/14"]
    overrides += [f"recipe.views.2.size={DINOV2['local']}", f"recipe.views.2.count={DINOV2['local_crops']}"]
    overrides += [f"recipe.inputs.1.views={DINOV2['local_crops']}"]
    overrides += [f"recipe.heads.{name}={head}" for name in ("global", "patches")]
    overrides += [f"recipe.targets.{number}.regularizer={centering}" for number in range(4)]
    run = load_run("dinov2", [*overrides, *options])
    return _our_step(run, deepspeed, _usual_masks(run, _batch(run, DINOV2)))


def _usual_masks(run: RunConfig, batch: Batch) -> Batch:
    """Return the batch with seeds that mask about the mean number of patches: 0.5 × 0.3 of the global crops."""
    side = DINOV2["image"] // DINOV2["patch"]
    (masked_input, _), mean = parse_recipe(run.recipe).inputs, 0.15 * 2 * len(batch) * side**2

    def excess(seeds_B: torch.Tensor) -> float:
        parts = build_inputs([masked_input], None, seeds_B, (side, side))
        return abs(sum(float(part.masked_BM.sum()) for part in parts if part.masked_BM is not None) - mean)

    draws = [torch.randint(0, 2**62, (len(batch),)) for _ in range(32)]
    return replace(batch, seeds_B=min(draws, key=excess))
