"""Cost estimates and results of fine-tuning runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from m3i_scale.backbones.build import backbone_config
from m3i_scale.backbones.internimage import InternImageConfig
from m3i_scale.config import OptimConfig, RunConfig
from m3i_scale.engine.deepspeed.resolve import load_ds_config
from m3i_scale.engine.deepspeed.schema import AUTO
from m3i_scale.engine.device import compute_dtype
from m3i_scale.engine.peak import device_name, named_peak
from m3i_scale.evaluation.commands import evaluate
from m3i_scale.exports.card import render_card
from m3i_scale.exports.export import Weights, export
from m3i_scale.exports.push import PROVENANCE
from m3i_scale.exports.source import find_source
from m3i_scale.exports.write import ExportContents
from m3i_scale.exports.write import Task as ExportTask
from m3i_scale.files import read_json, sha256_of, write_json
from m3i_scale.options import reading_bar
from m3i_scale.plan.planning import machine_of
from m3i_scale.plan.search import plan_run
from m3i_scale.shards.make import annotation_line
from m3i_scale.tasks.base import Task
from m3i_scale.tasks.labelled import Labelled
from m3i_scale.tasks.subset import Subset
from m3i_scale.tasks.unpacked import TRAIN
from m3i_scale.text import GIB, duration_text, format_differences, listed, redact

_LISTED_CLASSES = 12
RESULT, CARD = "finetune.json", "README.md"
_FOLLOWED: dict[str, set[str] | None] = {
    "task": None,
    "optim": set(OptimConfig.model_fields) - {"steps", "warmup_steps"},
    "data": {"augment"},
    "backbone": {"config"},
}
"""Sections and fields that are compared with the protocol; None: all fields."""


@dataclass(frozen=True)
class FineTuning:
    """Complete fine-tuning config; its shards may still have to be created."""

    task: Task
    protocol: str
    followed: RunConfig
    """The protocol's config."""
    run: RunConfig
    data: Labelled
    export_task: ExportTask
    subset: Subset | None = None
    """Subset of the training images; None: all of them."""
    random_weights: str | None = None
    """Export whose architecture is initialized randomly; None: the run starts from the export's weights."""

    @property
    def epochs(self) -> float:
        """Return the number of epochs over the training images."""
        return self.run.optim.steps * self.run.optim.batch_size / self.data.read

    def facts(self) -> dict[str, Any]:
        """Return the context that every result must include: protocol, deviations, data and schedule."""
        run = self.run
        of_protocol = run.protocol
        published = None if of_protocol is None else of_protocol.published
        stated = [] if of_protocol is None else of_protocol.deviations
        if of_protocol is not None and run.optim.steps != self.followed.optim.steps:
            stated = [text for text in stated if not text.startswith(f"{of_protocol.epochs} epochs ")]
        return {
            "task": self.task.kind,
            "protocol": self.protocol,
            "published": None if published is None else published.model_dump(mode="json"),
            "model": _model_line(run),
            "deviations": [*stated, *self._differences()],
            "backbone": run.backbone.from_pretrained,
            "datasets": {name: source.path for name, source in (run.data.datasets | run.data.validation).items()},
            "classes": len(self.data.classes),
            "class_names": self.data.classes,
            "class_images": self.data.class_images,
            "annotations": self.data.annotations,
            "samples": self.data.samples,
            "evaluated": self.data.evaluated,
            "unlabelled": self.data.unlabelled,
            "skipped": self.data.skipped,
            "per_class": None if self.subset is None else self.subset.per_class,
            "share": None if self.subset is None else self.subset.share,
            "subset_seed": None if self.subset is None else self.subset.seed,
            "epochs": self.epochs,
            "steps": run.optim.steps,
            "batch_size": run.optim.batch_size,
            "export_task": self.export_task,
        }

    def _differences(self) -> list[str]:
        """Return the deviations from the protocol. The length is compared in the protocol's unit."""
        followed = self.followed
        fitted = followed.optim.schedule.fitted(followed.optim.steps, self.run.optim.steps)
        fits: dict[str, Any] = {"schedule": fitted}
        if followed.protocol is not None:
            fits["lr"] = followed.protocol.lr_for(followed.optim.lr, backbone_config(self.run.backbone).hidden_size)
        followed = followed.model_copy(update={"optim": followed.optim.model_copy(update=fits)})
        differences = [] if self.subset is None else [f"trained on {self.subset.words}"]
        if self.random_weights is not None:
            differences.append(f"starts from random weights of the architecture of {self.random_weights}")
        differences += [
            line
            for part, fields in _FOLLOWED.items()
            for line in format_differences(
                part, *(getattr(run, part).model_dump(mode="json", include=fields) for run in (followed, self.run))
            )
        ]
        protocol, steps = followed.protocol, self.run.optim.steps
        if protocol is not None and protocol.steps_for(self.data.read, self.run.optim.batch_size) != steps:
            of_epochs, of_steps = f"{protocol.epochs}, is {self.epochs:.4g}", f"{protocol.steps}, is {steps}"
            differences.append(f"epochs was {of_epochs}" if protocol.epochs else f"steps was {of_steps}")
        thresholds = [repeat_threshold(run) for run in (followed, self.run)]
        differences += format_differences(f"data.datasets.{TRAIN}.repeat_threshold", *thresholds)
        if followed.deepspeed not in (AUTO, self.run.deepspeed):
            differences.append(f"deepspeed was {followed.deepspeed}, is {self.run.deepspeed}")
        return differences


def data_lines(facts: dict[str, Any]) -> list[str]:
    """Return lines about the data, with a warning if there are no images for evaluation."""
    names, images = facts["class_names"], facts["class_images"]
    if images is not None:
        names = [f"{name} {count}" for name, count in images.items()]
    lines = [f"class names{'' if images is None else ' (images)'}: {listed(names, _LISTED_CLASSES)}"]
    lines += [annotation_line(file, counts) for file, counts in (facts["annotations"] or {}).items()]
    if facts["evaluated"] == 0:
        lines.append("warning: there are no images for evaluation, so nothing will be measured. Fix: add DIR/val")
    return lines


def _model_line(run: RunConfig) -> str:
    """Describe the size of the backbone for comparison with the published result."""
    config = backbone_config(run.backbone)
    if isinstance(config, InternImageConfig):
        return f"{config.model_type}, {config.channels} channels, depths {config.depths}, images of {config.image_size}"
    depth, width, patch = config.num_hidden_layers, config.hidden_size, config.patch_size
    return f"{config.model_type}, {depth} layers of {width}, patches of {patch}, images of {config.image_size}"


def repeat_threshold(run: RunConfig) -> float | None:
    """Return the repeat threshold of the training dataset; see `DatasetConfig`."""
    return run.data.datasets[TRAIN].repeat_threshold if TRAIN in run.data.datasets else None


def planned(prepared: FineTuning) -> dict[str, Any]:
    """Estimate the cost of the run on this machine's device. GPUs other than an A100 count as an H100, unless
    `hardware.peak_tflops` is set."""
    run, name = prepared.run, device_name().lower()
    device = "cpu" if name == "cpu" else "a100" if "a100" in name else "h100"
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
    """Export the trained model, evaluate it on the evaluation images, and write and return the result."""
    run, task = prepared.run, prepared.task
    folder = run.output_dir / task.model
    weights: Weights = "student" if task.ema is None else "ema"
    tell(f"exporting into {folder}, as {prepared.export_task}")
    facts = export(run.output_dir, folder, weights, wanted=ExportContents(prepared.export_task), overwrite=True)
    result = prepared.facts() | {
        "step": facts["step"],
        "weights": weights,
        "export": str(folder),
        **dict.fromkeys(task.metrics),
    }
    if facts["heads"] is not None:
        result["heads"] = facts["heads"]
    if prepared.data.validation is not None:
        tell(f"measuring on {prepared.data.validation}")
        with reading_bar() as progress:
            document = evaluate(folder, str(prepared.data.validation), measures=(task.model,), progress=progress)
        write_json(run.output_dir / "evaluation.json", document)
        _write_card(run.output_dir / "checkpoints" / facts["checkpoint"], folder, document)
        figures = document["measures"][task.model]
        values = {key: 100 * figures[name]["value"] for key, name in task.metrics.items() if name in figures}
        result |= {**values, "figures": figures}
    write_json(run.output_dir / RESULT, result)
    return result


def _write_card(checkpoint: Path, folder: Path, evaluation: dict[str, Any]) -> None:
    """Update the model card with the evaluation, which needed the finished export."""
    stored = read_json(folder / PROVENANCE) | {"evaluation": redact(evaluation)}
    stored["files"] = {name: digest for name, digest in stored["files"].items() if name != CARD}
    card = render_card(find_source(checkpoint), stored, read_json(folder / "config.json"))
    (folder / CARD).write_text(card, encoding="utf-8")
    stored["files"][CARD] = sha256_of(folder / CARD)
    write_json(folder / PROVENANCE, stored)


def result_lines(document: dict[str, Any]) -> list[str]:
    """Format a plan or result as text lines, with the published result and deviations."""
    lines, metrics = [], cast(type[Task], Task.class_of(document["task"])).metrics
    for key, value in document.items():
        if key == "published" and value is not None:
            masks = "" if value["mask_ap"] is None else f", {value['mask_ap']:g} % of masks,"
            figure = f"{value['number']:g} % {value['metric']}{masks}"
            lines.append(f"published: {figure} by {value['model']} ({value['source']})")
        elif key == "published":
            lines.append("published: nothing by this protocol")
        elif key == "deviations":
            lines += [f"deviation: {text}" for text in value]
        elif key == "memory_gib":
            lines.append(f"memory: {value:.2f} GiB")
        elif key == "gpu_hours":
            lines.append(f"time: {duration_text(3600 * value)} on one {document['hardware']}")
        elif key == "class_names":
            lines += data_lines(document)
        elif key == "datasets":
            lines += [f"{name}: {shards}" for name, shards in value.items()]
        elif key in metrics and "figures" in document:
            estimate = document["figures"].get(metrics[key])
            lines += [] if estimate is None else [f"{key}: {_percent(estimate)}"]
        elif key == next(iter(metrics)):
            lines.append(f"{key}: there are no images to evaluate")
        elif isinstance(value, str | int | float):
            lines.append(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    return lines


def _percent(estimate: dict[str, Any]) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    guesses = {"chance": "by chance", "majority": "by the commonest class"}  # average precision has neither
    guess = "".join(f"; {by} {100 * estimate[name]:.2f}" for name, by in guesses.items() if name in estimate)
    return f"{value:.2f} % (95 % interval {low:.2f} to {high:.2f}{guess})"
