"""What every recipe costs: images/s, counted FLOPs, and the time beyond them.

The plain backbone (all patches of one view, forward and backward) sets the pace: FLOPs a second. A recipe's counted
FLOPs at that pace are the time that its arithmetic should take; `overhead` is what it takes beyond. Every recipe is
measured in turn with the backbone, so a drifting machine hits both.

    python benchmarks/recipes.py --json [--only simclr --only m3i]
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from _common import emit, machine, say
from _cost import count_flop, recipe_step, synthetic_batch
from torch import Tensor
from transformers import BitImageProcessor, ViTConfig, ViTModel

from m3i_scale.backbones.build import backbone_config, build_backbone
from m3i_scale.config import RunConfig, known_recipes, load_run
from m3i_scale.data.batch import Batch
from m3i_scale.engine.partition import initialize_sharded
from m3i_scale.objective.build import initialize_module
from m3i_scale.objective.recipe import parse_recipe

WIDTH, DEPTH, HEADS, IMAGE, PATCH, VOCABULARY, TOKENS = 384, 12, 6, 112, 16, 30522, 32
SMALL_VIEW = 48
"""Side in pixels: as multi-crop recipes have 96 or 98 beside 224."""
LABEL_SETS = {"classes": [str(number) for number in range(1000)]}


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    only: list[str] = typer.Option([], help="Only these recipes."),
    batch: int = 32,
    repeats: int = 3,
    threads: int = 0,
) -> None:
    """Print {recipe: {images_per_s, gflop, overhead, backbone_ratio}}, and the machine."""
    if threads:
        torch.set_num_threads(threads)
    document: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = _teacher(Path(folder))
        plain = _backbone_step(load_run("supervised", _sizes(batch)), batch)
        plain_flop = count_flop(plain)
        document["backbone"] = {"gflop": plain_flop / batch / 1e9}
        for name in only or known_recipes():
            run = _run(name, batch, teacher)
            step = recipe_step(run, LABEL_SETS, VOCABULARY, _batch(run, batch))
            flop = count_flop(step)
            seconds, pace = _in_turn(step, plain, repeats)
            expected_s = flop / plain_flop * pace
            document[name] = {
                "images_per_s": batch / seconds,
                "gflop": flop / batch / 1e9,
                "overhead": seconds / expected_s - 1,
                "backbone_ratio": seconds / pace,
            }
            cost = f"{flop / batch / 1e9:.1f} GFLOP, {seconds / expected_s - 1:+.1%}"
            say(f"{name}: {batch / seconds:.2f} images/s, {cost}")
            del step
            gc.collect()
    document |= {"sizes": {"width": WIDTH, "depth": DEPTH, "image": IMAGE, "patch": PATCH, "batch": batch}}
    document |= {"dtype": "float32", "threads": torch.get_num_threads(), "machine": machine()}
    emit(document)


def _sizes(batch: int, patch: int = PATCH) -> list[str]:
    return [
        f"backbone.config={{hidden_size: {WIDTH}, num_hidden_layers: {DEPTH}, num_attention_heads: {HEADS}, "
        f"intermediate_size: {4 * WIDTH}, image_size: {IMAGE}, patch_size: {patch}}}",
        "backbone.preset=null",
        f"optim.micro_batch_size={batch}",
    ]


def _run(name: str, batch: int, teacher: str) -> RunConfig:
    """The built-in recipe on a ViT-S; heads and decoders at their full sizes, a text tower as wide as the backbone."""
    built_in, overrides = load_run(name), _sizes(batch)
    raw = built_in.recipe
    if built_in.backbone.from_pretrained is not None:
        overrides.append(f"backbone.from_pretrained={teacher}")
    small = [number for number, view in enumerate(raw.get("views", [])) if "size" in view]
    overrides += [f"recipe.views.{number}.size={SMALL_VIEW}" for number in small]
    others = [known for known, spec in raw.get("teachers", {}).items() if spec["from_pretrained"] != "student"]
    overrides += [f"recipe.teachers.{known}.from_pretrained={teacher}" for known in others]
    heads = {target["head"] for target in raw["targets"] if target.get("encoder") == "teacher" and "head" in target}
    overrides += [f"recipe.heads.{head}.width={WIDTH}" for head in sorted(heads)]
    if any(target["kind"] == "text" for target in raw["targets"]):
        shape = f"hidden_size: {WIDTH}, num_hidden_layers: 6, num_attention_heads: 6, intermediate_size: {4 * WIDTH}"
        overrides += [f"text.config={{{shape}}}", f"text.max_tokens={TOKENS}"]
    return load_run(name, overrides)


def _teacher(folder: Path) -> str:
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    BitImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return str(folder)


def _backbone_step(run: RunConfig, batch: int) -> Callable[[], None]:
    backbone = build_backbone(backbone_config(run.backbone))
    initialize_sharded(backbone, initialize_module, seed=0)
    pixels_BCHW = torch.randn(batch, 3, IMAGE, IMAGE)

    def step() -> None:
        output: Tensor = backbone.encode(torch.cat(backbone.embed(pixels_BCHW), dim=1))
        output.square().mean().backward()
        backbone.zero_grad()

    return step


def _batch(run: RunConfig, count: int) -> Batch:
    views = parse_recipe(run.recipe).drawn_views
    return synthetic_batch(count, views, image=IMAGE, tokens=TOKENS, classes=1000, vocabulary=VOCABULARY)


def _in_turn(step: Callable[[], None], plain: Callable[[], None], repeats: int) -> tuple[float, float]:
    seconds: dict[str, list[float]] = {"step": [], "plain": []}
    step()
    for _ in range(repeats):
        for name, call in (("plain", plain), ("step", step)):
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return statistics.median(seconds["step"]), statistics.median(seconds["plain"])


if __name__ == "__main__":
    typer.run(main)
