"""Training history up to a checkpoint from metrics.jsonl: cost and losses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from m3i_scale.errors import ExportError
from m3i_scale.export.source import Source
from m3i_scale.files import read_json_lines
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.upgrade import upgrade_line

CURVE_ROWS = 10


def with_best_head(source: Source) -> tuple[Source, dict[str, Any] | None]:
    """Reduce a checkpoint of a sweep to its best head, and return it with the accuracy of all heads. Other checkpoints
    remain unchanged. The last evaluation at or before the checkpoint's step decides. In a tie, the first head wins."""
    task = source.run.task
    if task is None or not task.chooses_head:
        return source, None
    names = [target.name for target in source.recipe.targets]
    measured: dict[str, Any] = {}
    for record in _records(source):
        if record.get("kind") == "evaluation" and record.get("step", 0) <= source.step:
            measured = record
    scores = {name: measured[key] for name in names if (key := f"evaluation/{name}/top_1") in measured}
    if not scores:
        raise ExportError(
            "no head of the sweep is the best: none has been evaluated",
            where=str(source.run_dir / "metrics.jsonl"),
            why=f"it has no evaluation up to step {source.step}",
            fix="export a later checkpoint",
        )
    best = max(scores, key=lambda name: scores[name])
    target = next(target for target in source.run.recipe["targets"] if target["name"] == best)
    decoders = {target["decoder"]: source.run.recipe["decoders"][target["decoder"]]}
    recipe = source.run.recipe | {"targets": [target], "decoders": decoders}
    run = source.run.model_copy(update={"recipe": recipe})
    facts = {"chosen": best, "step": measured["step"], "top_1": scores}
    return replace(source, run=run, recipe=parse_recipe(recipe)), facts


def last_figures(source: Source) -> dict[str, Any]:
    """Return the last train record at or before the checkpoint's step; empty if there is none."""
    last: dict[str, Any] = {}
    for record in _trained(source):
        last = record
    return last


def compute_of(source: Source) -> dict[str, Any]:
    """Return the training cost up to the checkpoint; None for values missing in metrics.jsonl. Repeated steps and steps
    undone by a rollback are no longer in the file, so they do not count.

    Returns:
        `steps`; `samples`; `flop` of the model only, without recomputation; `rank_hours` from the durations of logged
        steps, each counted for all steps since the previous record; `device` of a rank: `cpu` or the GPU's name.
    """
    flop: float | None = None
    seconds: float | None = None
    per_step: Any = None
    counted = 0
    devices: set[str] = set()
    for record, steps, world in _counted(source):
        per_step = record.get("flop_per_step", per_step)
        if isinstance(per_step, int | float):
            flop, counted = (flop or 0.0) + per_step * steps, counted + steps
        if isinstance(record.get("device"), str):
            devices.add(record["device"])
        step_s = record.get("time/step")
        if isinstance(step_s, int | float) and world is not None:
            seconds = (seconds or 0.0) + step_s * steps * world
    if isinstance(per_step, int | float):  # steps without a record count like the last recorded one
        flop = (flop or 0.0) + per_step * (source.step - counted)
    return {
        "steps": source.step,
        "samples": source.step * source.run.optim.batch_size,
        "flop": flop,
        "rank_hours": None if seconds is None else seconds / 3600,
        "device": ", ".join(sorted(devices)) or None,
    }


def curve_of(source: Source) -> list[dict[str, Any]]:
    """Return step, loss and loss per target: of the first record, and of the last record in each tenth of training."""
    rows: dict[int, dict[str, Any]] = {}
    for record in _trained(source):
        rows[0 if not rows else math.ceil(record.get("step", 0) * CURVE_ROWS / source.step)] = record
    losses = {target.name: f"loss/{target.name}" for target in source.recipe.targets}
    return [
        {
            "step": row.get("step", 0),
            "loss": row.get("loss"),
            **{name: row[key] for name, key in losses.items() if key in row},
        }
        for row in rows.values()
    ]


def _trained(source: Source) -> Iterator[dict[str, Any]]:
    for record in _records(source):
        if record.get("kind") == "train" and record.get("step", 0) <= source.step:
            yield record


def _counted(source: Source) -> Iterator[tuple[dict[str, Any], int, int | None]]:
    """Yield run, stage and train records, the steps that each covers, and the number of ranks."""
    world = source.meta.get("world_size")
    before: int | None = None
    for record in _records(source):
        step = record.get("step", 0)
        if record.get("kind") == "run" and (step <= source.step or before is None):
            # A run that continues another run starts its file at that step. Later, a restart between two records leaves
            # steps without a record; they count toward the next record.
            world, before = record.get("world_size", world), step if before is None else before
            yield record, 0, None
        elif record.get("kind") == "stage" and step <= source.step:
            yield record, 0, None
        elif record.get("kind") == "train" and step <= source.step:
            yield record, step - (before or 0), world if isinstance(world, int) else None
            before = step


def _records(source: Source) -> Iterator[dict[str, Any]]:
    path = source.run_dir / "metrics.jsonl"
    return map(upgrade_line, read_json_lines(path)) if path.is_file() else iter(())
