"""Whole training steps on one device, for gpu.py: ours under its engine, open_clip's, and a loop as DINOv3's is.

A step trains on one synthetic batch on the device; ours includes the EMA update. On an accelerator all use bf16, and
each peer runs as in its own trainer (autocast, fused AdamW).
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from _cost import count_flop, synthetic_batch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from m3i_scale.backbones.build import backbone_config
from m3i_scale.config import RunConfig, load_run
from m3i_scale.data.batch import Batch
from m3i_scale.objective.ranks import ProcessGroupRanks
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.run.flops import step_flop
from m3i_scale.run.setup import ResolvedRun, resolve_engine, start_engine

TOKENS, VOCABULARY = 64, 30522
SMALL = (
    "backbone.preset=vit-ti/16",
    "backbone.config={image_size: 32, patch_size: 8, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: 128}",
    "text.config={hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128}",
)
"""Overrides that make a run small enough for a CPU."""
LABEL_SETS = {"imagenet": [str(number) for number in range(1000)]}
WARM_UP, REPEATS = 3, 7
Result = TypeVar("Result")


@dataclass
class Step:
    """Holds something that trains, and what it computes."""

    call: Callable[[], Any]
    images: int
    tflop: float
    """What the model computes; what is recomputed does not count."""
    close: Callable[[], None] = lambda: None


def our_step(recipe: str, deepspeed: str, micro_batch: int, *overrides: str) -> Step:
    """Return the engine's step of a built-in run on one rank, one micro-batch."""
    sizes = [f"optim.batch_size={micro_batch}", f"optim.micro_batch_size={micro_batch}", f"deepspeed={deepspeed}"]
    if parse_recipe(load_run(recipe).recipe).uses_text:
        sizes.append(f"text.max_tokens={TOKENS}")
    run = load_run(recipe, [*overrides, *sizes])
    parsed, config = parse_recipe(run.recipe), backbone_config(run.backbone)
    resolved = ResolvedRun(
        run,
        parsed,
        LABEL_SETS,
        range(VOCABULARY) if parsed.uses_text else None,  # type: ignore[arg-type]
        config.image_size,
        resolve_engine(run, 1, config.hidden_size),
        1,
    )
    engine, ema = start_engine(resolved, ProcessGroupRanks())
    batch = batch_of(run, micro_batch, config.image_size)

    def step() -> None:
        loss, _ = engine(batch)
        engine.backward(loss)
        engine.module.after_backward()
        engine.step()
        if ema is not None:
            ema.update(0.999)

    tflop = step_flop(run, LABEL_SETS, resolved.vocab_size)["model"] / 1e12
    return Step(step, micro_batch, tflop, engine.destroy)


def batch_of(run: RunConfig, size: int, image: int, tokens: int = TOKENS) -> Batch:
    """Return a batch with a category and a caption for every image, on the device."""
    recipe = parse_recipe(run.recipe)
    made = synthetic_batch(
        size,
        recipe.drawn_views,
        image=image,
        tokens=tokens if recipe.uses_text else 1,
        classes=1000,
        vocabulary=VOCABULARY,
        reads=recipe.reads,
    )
    return made.to(get_accelerator().current_device_name())


@dataclass(frozen=True)
class Tower:
    """Holds the shape of a ViT that all sides have."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    hidden: int


def open_clip_step(tower: Tower, images: int, *, compiled: bool) -> Step:
    """Return a step of open_clip's model and loss of that tower, with a text tower of BERT-Base's size."""
    import open_clip

    device = get_accelerator().current_device_name()
    vision = {"image_size": tower.image, "layers": tower.depth, "width": tower.width, "patch_size": tower.patch}
    vision |= {"head_width": tower.width // tower.heads, "mlp_ratio": tower.hidden / tower.width}
    text = {"context_length": TOKENS, "vocab_size": VOCABULARY, "width": 768, "heads": 12, "layers": 12}
    model = open_clip.CLIP(768, vision, text).to(device).train()
    loss_of, pixels = open_clip.ClipLoss(), torch.randn(images, 3, tower.image, tower.image, device=device)
    captions = torch.randint(3, VOCABULARY, (images, TOKENS), device=device)

    def loss() -> Tensor:
        with _autocast():
            image_features, text_features, scale = model(pixels, captions)
            value: Tensor = loss_of(image_features, text_features, scale)
            return value

    step = _peer(model, loss, images)
    if compiled:
        model.compile()
    return step


def dino_like_step(tower: Tower, images: int, *, compiled: bool) -> Step:
    """Return a step of a timm student on one view, with a frozen average of it as target on another."""
    import timm

    device = get_accelerator().current_device_name()
    sizes = {"img_size": tower.image, "patch_size": tower.patch, "embed_dim": tower.width, "depth": tower.depth}
    sizes |= {"num_heads": tower.heads, "mlp_ratio": tower.hidden / tower.width, "num_classes": 0}
    student, teacher = (timm.models.VisionTransformer(**sizes).to(device) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    views = torch.randn(2, images, 3, tower.image, tower.image, device=device)
    averages, followed = list(teacher.parameters()), list(student.parameters())

    def loss() -> Tensor:
        with _autocast():
            with torch.no_grad():
                wanted_BD = teacher(views[1]).float().softmax(dim=-1)
            return nn.functional.cross_entropy(student(views[0]).float(), wanted_BD)

    def average() -> None:
        with torch.no_grad():
            torch._foreach_lerp_(averages, followed, 0.001)

    step = _peer(student.train(), loss, images, average)
    if compiled:
        for block in (*student.blocks, *teacher.blocks):
            block.compile()
    return step


def _peer(model: nn.Module, loss: Callable[[], Tensor], images: int, after: Callable[[], None] = lambda: None) -> Step:
    """Count before the model is compiled: what a mode has looked into once, torch does not compile any more."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        after()

    return Step(step, images, count_flop(lambda: loss().backward()) / 1e12)


def _autocast() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(get_accelerator().device_name(), torch.bfloat16)


def seconds_of(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the median of one call, after some that warm up; the device is awaited round each."""
    found = []
    for repeat in range(WARM_UP + repeats):
        get_accelerator().synchronize()
        started = time.perf_counter()
        call()
        get_accelerator().synchronize()
        if repeat >= WARM_UP:
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def alone(make: Callable[[], Step], use: Callable[[Step], Result]) -> Result | None:
    """Make a step that has the device for itself, use it, and leave nothing there; None where it does not fit.

    It is used after two calls: the first one makes the optimizer's moments. The peak of memory is of what follows.
    """
    accelerator = get_accelerator()
    fits = False
    try:
        step = make()
        try:
            step.call()
            accelerator.reset_peak_memory_stats()
            step.call()
            fits = True
            return use(step)
        finally:
            step.close()
            del step
    except torch.OutOfMemoryError:
        if fits:
            raise
        return None
    finally:
        gc.collect()
        accelerator.empty_cache()
