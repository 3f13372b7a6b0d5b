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
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitImageProcessor, ViTConfig, ViTModel

from m3i_scale.backbones.vit import Backbone, vit_config
from m3i_scale.config import RunConfig, known_recipes, load_run
from m3i_scale.data.batch import Batch
from m3i_scale.objective.build import build_objective, initialize_module
from m3i_scale.objective.information import Objective
from m3i_scale.scale.partition import initialize_sharded

WIDTH, DEPTH, HEADS, IMAGE, PATCH, VOCABULARY, TOKENS = 384, 12, 6, 224, 16, 30522, 32
LABEL_SETS = {"classes": [str(number) for number in range(1000)]}


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    only: list[str] = typer.Option([], help="Only these recipes."),  # noqa: B008
    batch: int = 16,
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
        plain_flop = _count(plain)
        document["backbone"] = {"gflop": plain_flop / batch / 1e9}
        for name in only or known_recipes():
            step = _recipe_step(_run(name, batch, teacher), batch)
            flop = _count(step)
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
    raw, overrides = load_run(name).recipe, _sizes(batch)
    if "teacher" in raw:
        overrides.append(f"recipe.teacher.from_pretrained={teacher}")
    if any(target["modality"] == "text" for target in raw["targets"]):
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
    backbone = Backbone(vit_config(run.backbone))
    initialize_sharded(backbone, initialize_module, seed=0)
    pixels_BCHW = torch.randn(batch, 3, IMAGE, IMAGE)

    def step() -> None:
        output: Tensor = backbone.encode(torch.cat(backbone.embed(pixels_BCHW), dim=1))
        output.square().mean().backward()
        backbone.zero_grad()

    return step


def _recipe_step(run: RunConfig, batch: int) -> Callable[[], None]:
    objective: Objective = build_objective(run, LABEL_SETS, VOCABULARY)
    initialize_sharded(objective, initialize_module, seed=0)
    given = _batch(batch, objective.recipe.views)

    def step() -> None:
        loss, _ = objective(given)
        loss.backward()
        objective.zero_grad()

    return step


def _batch(count: int, views: int) -> Batch:
    crops = torch.tensor([0.0, 0.0, IMAGE, IMAGE]).expand(views, count, 4)
    return Batch(
        images_VBCHW=torch.randint(0, 256, (views, count, 3, IMAGE, IMAGE), dtype=torch.uint8),
        crops_VB4=crops,
        flips_VB=torch.zeros(views, count, dtype=torch.bool),
        sizes_B2=torch.full((count, 2), float(IMAGE)),
        labels_B=torch.randint(0, 1000, (count,)),
        label_sets_B=torch.zeros(count, dtype=torch.int64),
        text_ids_BT=torch.randint(5, VOCABULARY, (count, TOKENS)),
        text_mask_BT=torch.ones(count, TOKENS, dtype=torch.bool),
        has_text_B=torch.ones(count, dtype=torch.bool),
        captions_B=torch.arange(1, count + 1),
        seeds_B=torch.randint(0, 2**62, (count,)),
        keys=[str(number) for number in range(count)],
    )


def _count(step: Callable[[], None]) -> int:
    """FLOPs of one step, forward and backward; also warms up."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


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
