"""Tell what a fine-tuning takes before it begins, and what it is worth when it is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from m3i_scale.evaluate.commands import evaluate
from m3i_scale.files import write_json
from m3i_scale.hub.export import export
from m3i_scale.hub.write import Wanted
from m3i_scale.run.finetune import FineTuning
from m3i_scale.run.plan_search import plan_run
from m3i_scale.run.planning import machine_of
from m3i_scale.scale.deepspeed.resolve import load_ds_config
from m3i_scale.scale.peak import compute_dtype, named_peak
from m3i_scale.text import GIB

RESULT = "finetune.json"
FIGURES = {"top-1": "top_1", "mIoU": "miou"}
"""What a result calls a figure, in percent, by the name that `evaluate` gives it."""


def planned(prepared: FineTuning, device: str) -> dict[str, Any]:
    """Return what the run takes on one device, of which nothing is started.

    Args:
        prepared: the run.
        device: h100, a100 or cpu; `hardware.peak_tflops` takes the place of its peak.
    """
    run = prepared.run
    peak = run.hardware.peak_tflops
    rate = None if peak is None else named_peak(peak, compute_dtype(load_ds_config(run.deepspeed))).tflops
    machine = machine_of(device, nodes=1, ranks_per_node=1, memory_gib=1.0, tflops=rate)
    taken = plan_run(run, machine, classes=len(prepared.data.classes), samples=None).planned
    return prepared.facts() | {
        "hardware": device,
        "memory_gib": taken.peak_bytes / GIB,
        "gpu_hours": run.optim.steps * taken.step_s / 3600,
    }


def measure(prepared: FineTuning, tell: Callable[[str], None]) -> dict[str, Any]:
    """Export the trained model, measure it on the images for evaluation, and write and return the result."""
    run, outcome = prepared.run, prepared.outcome
    folder = run.output_dir / outcome.model
    weights: Any = "student" if run.task is None or run.task.ema is None else "momentum"
    tell(f"exporting into {folder}, as {prepared.export_task}")
    facts = export(run.output_dir, folder, weights, wanted=Wanted(prepared.export_task), overwrite=True)
    name = FIGURES[outcome.metric]
    result = prepared.facts() | {
        "step": facts["step"],
        "weights": weights,
        "export": str(folder),
        "export_task": prepared.export_task,
        name: None,
    }
    if prepared.data.validation is not None:
        tell(f"measuring on {prepared.data.validation}")
        document = evaluate(folder, str(prepared.data.validation), measures=(outcome.model,))
        write_json(run.output_dir / "evaluation.json", document)
        figures = document["measures"][outcome.model]
        result |= {name: 100 * figures[outcome.metric]["value"], "figures": figures}
    write_json(run.output_dir / RESULT, result)
    return result


def lines_of(document: dict[str, Any]) -> list[str]:
    """Return a plan or a result as lines for people: what was published, and what differs, beside the figure."""
    lines = []
    metrics = {name: metric for metric, name in FIGURES.items()}
    for key, value in document.items():
        if key == "published" and value is not None:
            metric = value["metric"]
            lines.append(f"published: {value['number']:g} % {metric} by {value['model']} ({value['source']})")
        elif key == "published":
            lines.append("published: nothing by this protocol")
        elif key == "deviations":
            lines += [f"deviation: {text}" for text in value]
        elif key == "sources":
            lines += [f"{name}: {shards}" for name, shards in value.items()]
        elif key in metrics:
            estimate = None if value is None else document["figures"][metrics[key]]
            lines.append(f"{key}: {'there are no images to evaluate' if estimate is None else _percent(estimate)}")
        elif isinstance(value, str | int | float):
            lines.append(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    return lines


def _percent(estimate: dict[str, Any]) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    guess = "chance" if "chance" in estimate else "majority"
    by = "by chance" if guess == "chance" else "by the commonest class"
    return f"{value:.2f} % (95 % interval {low:.2f} to {high:.2f}; {by} {100 * estimate[guess]:.2f})"
