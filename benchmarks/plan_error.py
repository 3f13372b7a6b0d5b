"""What `m3i-scale plan` predicts beside what two ranks of the real trainer take, at their peak.

Every case trains for a few steps on shards that the benchmark makes. On a host the peak is the resident memory of a
rank; `--allocator returned` (the default) lets glibc give large tensors back as soon as they are freed, so that it is
the peak of live tensors, as on an accelerator; `kept` leaves the trainer's own setting, with which the holes of the
heap stay. What a process holds beside tensors is measured once, with a model of a few thousand parameters.

    python benchmarks/plan_error.py --json [--only zero3_bf16]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer
from _common import emit, machine, say
from _plan_rank import measure
from _shards import make_shards
from deepspeed.accelerator import get_accelerator

from m3i_scale.config import load_run
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.engine.deepspeed.rules import precision
from m3i_scale.errors import EXIT_USER_ERROR, did_you_mean
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.output import release_stdout
from m3i_scale.plan.planning import GIB, Choice, Machine, Model, estimate, read_vocabulary
from m3i_scale.plan.timing import Links
from m3i_scale.run.setup import run_yaml

RANKS, STEPS = 2, 2
_SHORT = "text.max_tokens=8"  # the captions of the shards fill that
_VIT = "backbone.preset=vit-b/16"
_SMALL_TEXT = "text.config={hidden_size: 384, num_hidden_layers: 4, num_attention_heads: 6, intermediate_size: 1536}"


def _case(recipe: str, engine: str, micro_batch: int, policy: str, *more: str) -> tuple[str, list[str]]:
    sizes = [f"optim.micro_batch_size={micro_batch}", f"optim.batch_size={RANKS * micro_batch}"]
    return recipe, [_VIT, f"deepspeed={engine}", f"backbone.activation_checkpointing={policy}", *sizes, *more]


def _config(**fields: int) -> str:
    return "backbone.config={" + ", ".join(f"{key}: {value}" for key, value in fields.items()) + "}"


CASES = {
    "zero1_fp32": _case("supervised", "zero1_cpu_fp32", 16, "none", _config(image_size=64)),
    "zero1_bf16_momentum": _case("sim", "zero1_bf16", 8, "none", _config(image_size=64, num_hidden_layers=8)),
    "zero2_bf16": _case("supervised", "zero2_bf16", 8, "none", _config(image_size=112)),
    "zero2_fp32_every_2": _case("supervised", "zero2_fp32", 16, "every_2", _config(image_size=128)),
    "zero3_bf16": _case("supervised", "zero3_cpu", 16, "none", _config(image_size=128)),
    "zero3_fp32_full": _case("supervised", "zero3_cpu_fp32", 8, "full", _config(image_size=64)),
    "zero3_bf16_momentum_every_2": _case("sim", "zero3_cpu", 8, "every_2", _config(image_size=64)),
    "zero3_bf16_text": _case(
        "clip", "zero3_cpu", 16, "none", "backbone.preset=vit-s/16", _config(image_size=64), _SHORT
    ),
    "zero3_lean_full": _case(
        "supervised", "lean", 8, "full", "backbone.preset=vit-l/16", _config(image_size=64, num_hidden_layers=12)
    ),
    "zero3_m3i_full": _case(
        "m3i", "zero3_cpu", 8, "full", _config(image_size=64, num_hidden_layers=6), _SMALL_TEXT, _SHORT
    ),
}
_TINY = _config(
    image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
)


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    only: list[str] = typer.Option([], help="Only these cases."),
    again: Path | None = typer.Option(None, help="Measure nothing: take it from an earlier document."),
    allocator: str = typer.Option("returned", help="returned or kept: what glibc does with freed tensors."),
) -> None:
    """Print {cases: [{name, predicted_gib, measured_gib, error, parts}], median_error, worst_error, machine}."""
    if unknown := [case for case in only if case not in CASES]:
        say(f"error: no case '{unknown[0]}': {did_you_mean(unknown[0], CASES)}")
        sys.exit(EXIT_USER_ERROR)
    if allocator == "returned" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # glibc reads it when a process starts
        os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="131072")
        release_stdout()
        os.execv(sys.executable, [sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_shards(folder)
        _write_files(folder)
        cases = {case: _run_file(folder, shards, case, *CASES[case]) for case in only or CASES}
        empty = ("supervised", [_TINY, "deepspeed=zero3_cpu", "optim.micro_batch_size=8", "optim.batch_size=16"])
        nothing = _run_file(folder, shards, "empty", *empty)
        if again is None:
            measured = {case: _measured(case, path) for case, path in {"empty": nothing, **cases}.items()}
        else:
            measured = json.loads(again.read_text())["measured_bytes"]
        base = measured["empty"] - _predict(nothing, 0)[0]
        say(f"beside tensors a rank holds {base / GIB:.3f} GiB")
        results = [_compared(case, path, measured[case], base) for case, path in cases.items()]
    errors = [abs(result["error"]) for result in results]
    document: dict[str, object] = {
        "measured_bytes": measured,
        "cases": results,
        "workspace_gib": base / GIB,
        "allocator": allocator,
    }
    document |= {"median_error": statistics.median(errors), "worst_error": max(errors), "ranks": RANKS}
    emit(document | {"machine": machine()})


def _measured(case: str, run_file: Path) -> int:
    peak = measure(run_file, RANKS)
    say(f"{case}: {peak / GIB:.3f} GiB measured")
    return peak


def _compared(case: str, run_file: Path, measured: int, base: int) -> dict[str, Any]:
    predicted, parts = _predict(run_file, base)
    error = predicted / measured - 1
    say(f"{case}: {predicted / GIB:.3f} GiB predicted, {measured / GIB:.3f} measured, {error:+.1%}")
    return {
        "name": case,
        "predicted_gib": predicted / GIB,
        "measured_gib": measured / GIB,
        "error": error,
        "parts_gib": {part: size / GIB for part, size in parts.items()},
    }


def _write_files(folder: Path) -> None:
    """DeepSpeed files that are not built in: fp32 under stage 2, and 16 bits throughout."""
    stage1, stage3 = load_ds_config("zero1_cpu_fp32"), load_ds_config("zero3_cpu")
    stage2 = stage1 | {"zero_optimization": stage1["zero_optimization"] | {"stage": 2}}
    lean = stage3 | {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        "zero_optimization": stage3["zero_optimization"] | {"memory_efficient_linear": True},
    }
    del lean["data_types"]
    for name, content in (("zero2_fp32", stage2), ("lean", lean)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def _run_file(folder: Path, shards: Path, case: str, recipe: str, overrides: list[str]) -> Path:
    files = {f"deepspeed={name}": f"deepspeed={folder / name}.json" for name in ("lean", "zero2_fp32")}
    own = [files.get(item, item) for item in overrides]
    own += [f"data.datasets.shapes.path={shards}", f"output_dir={folder / case}", "data.streams=4"]
    own += [f"optim.steps={STEPS}", "optim.warmup_steps=1", "log.every_steps=1", "log.progress=false"]
    own.append("checkpoint.background=false")  # nothing is saved there
    path = folder / f"{case}.yaml"
    path.write_text(run_yaml(load_run(recipe, own)))
    return path


def _predict(run_file: Path, base: int) -> tuple[int, dict[str, int]]:
    run: Any = load_run(str(run_file))
    links = Links(1, RANKS, 1.0, 1.0, 1.0)
    on_host = get_accelerator().device_name() == "cpu"
    where = Machine("this", links, 1e3, {"fp32": 1.0, "bf16": 1.0, "fp16": 1.0}, 1.0, on_host, base / GIB)
    raw = load_ds_config(run.deepspeed)
    model = Model(run, read_vocabulary(run, parse_recipe(run.recipe), None, None), RANKS, precision(raw))
    choice = Choice(run.deepspeed, run.backbone.activation_checkpointing, run.optim.micro_batch_size)
    found = estimate(model, where, choice)
    return found.peak_bytes, found.parts


if __name__ == "__main__":
    typer.run(main)
