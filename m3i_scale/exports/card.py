"""Model card of an export: description, training data and history, and usage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from m3i_scale import __version__
from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.families import family_of
from m3i_scale.exports.source import Source, model_files, training_records
from m3i_scale.text import estimates, redact_text

_PIPELINES = {
    "features": "image-feature-extraction",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
    "backbone": "image-feature-extraction",
    "classification": "image-classification",
    "zero_shot": "zero-shot-image-classification",
}
CURVE_ROWS = 10
OLDEST_TRANSFORMERS = "4.57"
"""Oldest version that loads every export except detectors, as tested in tests/hub/test_oldest_transformers.py."""
OLDEST_OF_DETECTOR = "5.24"
"""Oldest version with RF-DETR and support for the source files of a Mask R-CNN. In version 4, ViT layers pass no
arguments on to their attention."""


def render_card(source: Source, provenance: dict[str, Any], config: dict[str, Any]) -> str:
    """Render the README.md of an export from the contents of export.json and config.json of the vision model."""
    # No HTML escaping, because this is Markdown; untrusted text goes through `cell`.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["cell"] = cell
    evaluation, task = provenance["evaluation"], provenance["task"]
    shape = backbone_config(source.run.backbone)
    return environment.get_template("card.md.j2").render(
        provenance,
        name=source.run.name,
        version=__version__,
        oldest_transformers=OLDEST_OF_DETECTOR if task == "detection" else OLDEST_TRANSFORMERS,
        architecture=config["architectures"][0],
        model_type=config["model_type"],
        timm=config["model_type"] == "timm_wrapper",
        pipeline=_PIPELINES[task],
        tuned=source.run.task is not None and not source.run.task.freeze,
        image_size=shape.image_size,
        patches=(shape.image_size // shape.patch_size) ** 2,
        pooling=task == "features" and config["model_type"] == "vit",
        remote_code=bool(model_files(shape)[0]),
        tokens=shape.model_type != "internimage",
        class_token=family_of(shape).has_class_token,
        registers=int(getattr(shape, "num_register_tokens", 0)),
        width=shape.hidden_size,
        patch=shape.patch_size,
        side=shape.image_size // shape.patch_size,
        classes={name: len(names) for name, names in source.label_sets.items()}
        if source.recipe.uses_categories
        else {},
        segments=source.recipe.reads_masks,
        detects=source.recipe.reads in ("boxes", "boxes_and_masks"),
        masks=source.recipe.reads == "boxes_and_masks",
        queries=config["model_type"] == "eomt",
        queried=config["model_type"] == "rf_detr",
        text=source.recipe.uses_text_tower and task == "features" and provenance["format"] != "timm",
        max_tokens=source.run.text.max_tokens,
        blend=provenance.get("blend"),
        vocab_size=source.vocab_size,
        recipe=source.recipe.summary(),
        description=redact_text(source.run.description),
        optim=source.run.optim.model_dump(mode="json"),
        curve=_table(provenance["curve"]),
        evaluation_rows=list(evaluation_rows(evaluation["measures"])) if evaluation else [],
        difference=max(provenance["verified"]["largest_output_difference"].values()),
    )


def _table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return a table of metrics with the union of all names as header; missing values are empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    body = [[_figure(row[name]) if name in row else "" for name in names] for row in rows]
    return [names, *body] if rows else []


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else cell(value)


def evaluation_rows(measures: Any) -> Iterator[tuple[str, str, str, str]]:
    """Yield metric, value, interval and chance level for every estimate in an evaluation's `measures`."""
    forms = {"chance": "{:.3g}", "majority": "majority {:.3g}"}
    for name, estimate, guesses in estimates(measures):
        guess = ", ".join(forms[key].format(figure) for key, figure in guesses.items())
        yield name, f"{estimate['value']:.3f}", f"{estimate['low']:.3f} … {estimate['high']:.3f}", guess


def cell(value: Any) -> str:
    """Return a value as the text of one table cell, escaped so that it cannot end the cell, row or table."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{cell(key)}: {cell(item)}" for key, item in value.items())
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())


def last_figures(source: Source) -> dict[str, Any]:
    """Return the last train record at or before the checkpoint's step; empty if there is none."""
    last: dict[str, Any] = {}
    for record in _trained(source):  # a long run has more records than fit into memory
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
    for record in training_records(source):
        if record.get("kind") == "train" and record.get("step", 0) <= source.step:
            yield record


def _counted(source: Source) -> Iterator[tuple[dict[str, Any], int, int | None]]:
    """Yield run, stage and train records, the steps that each covers, and the number of ranks."""
    world = source.meta.get("world_size")
    before: int | None = None
    for record in training_records(source):
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
