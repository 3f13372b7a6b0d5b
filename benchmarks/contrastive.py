"""Gradient accumulation with losses over all samples of a step (`optim.contrastive_batch: global`), beside plain
accumulation and one large batch: differences of gradients, time of a step, and peak memory.

One rank, plain modules without an engine. `difference` is the norm of the difference to the gradient of one large
batch, relative to the norm of that gradient. Times are those of the fastest step; with one thread on a CPU, they are
CPU time. Every way has a process of its own, in which memory is measured: peak resident memory on a CPU, allocated
memory on a GPU, with weights and gradients.

    python benchmarks/contrastive.py --json [--only clip]
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable

import torch
import typer
from _common import emit, machine, say
from _cost import synthetic_batch
from deepspeed.accelerator import get_accelerator

from m3i_scale.config import load_run
from m3i_scale.data.batch import Batch
from m3i_scale.engine.partition import initialize_sharded
from m3i_scale.objective.build import build_objective, initialize_module
from m3i_scale.objective.information import Objective
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.objective.step_features import StepFeatures

RECIPES = ("clip", "siglip", "simclr", "barlow", "vicreg", "sim", "m3i")
WIDTH, DEPTH, HEADS, IMAGE, PATCH, VOCABULARY, TOKENS = 192, 12, 3, 112, 16, 30522, 32
LABEL_SETS = {"classes": [str(number) for number in range(1000)]}


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    only: list[str] = typer.Option([], help="Only these recipes."),
    micro_batch: int = 8,
    accumulation: int = 4,
    repeats: int = 3,
    threads: int = 1,
) -> None:
    """Print {recipe: {difference: {micro, global}, seconds: {micro, global, large}, memory_gib: …}}."""
    document: dict[str, object] = {}
    spawn = multiprocessing.get_context("spawn")
    for name in only or RECIPES:
        arguments = name, micro_batch, accumulation, threads
        with spawn.Pool(1) as pool:
            difference = pool.apply(_differences, arguments)
        seconds, memory_gib = {}, {}
        for way in WAYS:
            with spawn.Pool(1) as pool:
                seconds[way], memory_gib[way] = pool.apply(_measure, (way, *arguments, repeats))
        document[name] = {"difference": difference, "seconds": seconds, "memory_gib": memory_gib}
        say(f"{name}: {document[name]}")
    sizes = {"width": WIDTH, "depth": DEPTH, "image": IMAGE, "patch": PATCH, "micro_batch": micro_batch}
    document |= {"sizes": sizes | {"accumulation": accumulation}, "dtype": "float32", "threads": threads}
    emit(document | {"machine": machine()})


def _prepared(name: str, count: int, threads: int) -> tuple[Objective, Batch]:
    torch.set_num_threads(threads)
    sizes = f"hidden_size: {WIDTH}, num_attention_heads: {HEADS}, intermediate_size: {4 * WIDTH}"
    overrides = [
        f"backbone.config={{{sizes}, num_hidden_layers: {DEPTH}, image_size: {IMAGE}, patch_size: {PATCH}}}",
        "backbone.preset=null",
    ]
    if parse_recipe(load_run(name).recipe).uses_text:
        overrides += [f"text.config={{{sizes}, num_hidden_layers: 6}}", f"text.max_tokens={TOKENS}"]
    if name == "sim":  # its batch norm over tokens cannot span micro-batches
        overrides += ["recipe.ema={start: 0.995, end: 1.0}", "recipe.decoders.dense={kind: transformer, depth: 4}"]
    run = load_run(name, overrides)
    device = get_accelerator().current_device_name()
    objective = build_objective(run, LABEL_SETS, VOCABULARY)
    initialize_sharded(objective, initialize_module, seed=0)
    torch.manual_seed(0)
    views = parse_recipe(run.recipe).drawn_views
    batch = synthetic_batch(count, views, image=IMAGE, tokens=TOKENS, classes=1000, vocabulary=VOCABULARY)
    return objective.to(device).train(), batch.to(device)


def _parts(batch: Batch, count: int) -> list[Batch]:
    size = len(batch) // count
    slices = [slice(size * number, size * (number + 1)) for number in range(count)]
    return [
        Batch(**{name: value[:, rows] if "_VB" in name else value[rows] for name, value in vars(batch).items()})
        for rows in slices
    ]


def _micro(objective: Objective, batch: Batch, count: int) -> None:
    for part in _parts(batch, count):
        (objective(part)[0] / count).backward()


def _global(objective: Objective, batch: Batch, count: int) -> None:
    parts, step = _parts(batch, count), StepFeatures(count)
    with torch.no_grad():
        for step.number in range(1, count):
            objective(parts[step.number], step)
    for step.number in range(count):
        (objective(parts[step.number], step)[0] / count).backward()


def _large(objective: Objective, batch: Batch, count: int) -> None:
    objective(batch)[0].backward()


WAYS: dict[str, Callable[[Objective, Batch, int], None]] = {"micro": _micro, "global": _global, "large": _large}


def _differences(name: str, micro_batch: int, accumulation: int, threads: int) -> dict[str, float]:
    gradients = {}
    for way, call in WAYS.items():  # memories of earlier batches start empty for each
        objective, batch = _prepared(name, micro_batch * accumulation, threads)
        call(objective, batch, accumulation)
        trained = [parameter.grad for parameter in objective.parameters() if parameter.grad is not None]
        gradients[way] = torch.cat([gradient.flatten() for gradient in trained])
    large = gradients.pop("large")
    return {way: float((gradient - large).norm() / large.norm()) for way, gradient in gradients.items()}


def _measure(
    way: str, name: str, micro_batch: int, accumulation: int, threads: int, repeats: int
) -> tuple[float, float]:
    objective, batch = _prepared(name, micro_batch * accumulation, threads)
    accelerator, seconds = get_accelerator(), []
    on_cpu = accelerator.device_name() == "cpu"
    clock = time.process_time if on_cpu and threads == 1 else time.perf_counter
    for _ in range(1 + repeats):
        started = clock()
        WAYS[way](objective, batch, accumulation)
        accelerator.synchronize()
        seconds.append(clock() - started)
        objective.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not on_cpu:
        peak = accelerator.max_memory_allocated()
    return min(seconds[1:]), peak / 2**30


if __name__ == "__main__":
    typer.run(main)
