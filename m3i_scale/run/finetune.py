"""`m3i-scale finetune` makes a run file of a protocol, an export and labelled images, trains by it, and measures."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_scale.config import Classification, OptimConfig, RunConfig, load_run
from m3i_scale.downstream.labelled import TRAIN, Labelled, find_labelled
from m3i_scale.errors import ConfigError, ExportError, Faults
from m3i_scale.evaluate.commands import evaluate
from m3i_scale.files import write_json
from m3i_scale.hub.export import export
from m3i_scale.hub.source import Source
from m3i_scale.hub.write import Task, Wanted, plan_parts
from m3i_scale.objective.recipe import load_run_and_recipe, parse_recipe
from m3i_scale.rank_variables import adopt_rank_variables
from m3i_scale.run.check import Checks
from m3i_scale.run.plan_search import plan_run
from m3i_scale.run.planning import machine_of
from m3i_scale.scale.deepspeed.resolve import load_ds_config
from m3i_scale.scale.peak import compute_dtype, named_peak
from m3i_scale.text import GIB, told_differences

RESULT = "finetune.json"
_FOLLOWED: dict[str, set[str] | None] = {
    "task": None,
    "optim": set(OptimConfig.model_fields) - {"steps", "warmup_steps"},
    "data": {"augment"},
    "backbone": {"config"},
}
"""Sections, and their fields, in which a run may differ from its protocol; None: all."""
_COMPUTED = {
    "backbone.from_pretrained": "EXPORT",
    "backbone.preset": "EXPORT",
    "data.sources": "--data",
    "data.validation": "--data",
    "protocol": "--protocol",
}
"""Keys that the command sets itself, and what it takes them from."""


@dataclass(frozen=True)
class FineTuning:
    """Holds a run file that is complete but for shards that are still to be made."""

    protocol: str
    run: RunConfig
    data: Labelled
    epochs: float
    """Of the images for training."""
    export_task: Task
    """As what the result is exported."""

    def facts(self) -> dict[str, Any]:
        """Return what a result cannot be read without."""
        run = self.run
        of_protocol = run.protocol
        published = None if of_protocol is None else of_protocol.published
        stated = [] if of_protocol is None else of_protocol.deviations
        return {
            "task": "classification",
            "protocol": self.protocol,
            "published": None if published is None else published.model_dump(mode="json"),
            "deviations": [*stated, *self._differences()],
            "backbone": run.backbone.from_pretrained,
            "sources": {name: source.shards for name, source in (run.data.sources | run.data.validation).items()},
            "classes": len(self.data.classes),
            "samples": self.data.samples,
            "epochs": self.epochs,
            "steps": run.optim.steps,
            "batch_size": run.optim.batch_size,
        }

    def _differences(self) -> list[str]:
        """Return where the run is not as the file of the protocol has it; its length counts in epochs."""
        followed = load_run(self.protocol)
        differences = [
            told
            for part, fields in _FOLLOWED.items()
            for told in told_differences(
                part, *(getattr(run, part).model_dump(mode="json", include=fields) for run in (followed, self.run))
            )
        ]
        epochs = None if followed.protocol is None else followed.protocol.epochs
        # Steps are whole: they may be off by a half.
        if epochs is not None and abs(self.epochs - epochs) * self.data.samples > self.run.optim.batch_size:
            differences.append(f"epochs was {epochs}, is {self.epochs:.4g}")
        if followed.deepspeed != self.run.deepspeed:
            differences.append(f"deepspeed was {followed.deepspeed}, is {self.run.deepspeed}")
        return differences


def prepare_classification(
    start: str,
    folder: Path,
    protocol: str,
    overrides: list[str],
    *,
    epochs: int | None,
    shards: Path | None,
    here: bool,
) -> FineTuning:
    """Put the run file together, and check all of it that can be checked before images are read.

    Args:
        start: an export, or what else `backbone.from_pretrained` names.
        folder: of labelled images.
        protocol: a run file with a task, or the name of a built-in one.
        overrides: `section.key=value`, which come last.
        epochs: default: the protocol's.
        shards: where images are packed into; default: `shards` in the output folder.
        here: whether this machine is to train.

    Raises:
        UserError: what does not hold together.
    """
    _refuse_ranks(protocol)
    _refuse_run_folder(start)
    _refuse_computed(overrides)
    first = ["backbone.preset=null", f"backbone.from_pretrained={json.dumps(start)}"]
    # The length is not known yet: whatever is measured in steps fits into so many.
    run, _ = load_run_and_recipe(protocol, [*first, *overrides, "optim.steps=1000000000", "optim.warmup_steps=0"])
    task = run.task
    if not isinstance(task, Classification):
        raise ConfigError(
            "the protocol trains no classifier",
            where=f"--protocol {protocol}",
            fix="one with task: {kind: classification}",
        )
    data = find_labelled(folder, shards or run.output_dir / "shards", run.output_dir / "index")
    if shards is not None and not data.train.is_relative_to(shards):
        raise ConfigError(
            "--shards has no effect: the data are in shards", where=f"--data {folder}", fix="leave it out"
        )
    computed = [*first, *_sources(data), *_length(run, load_run(protocol).optim, data, epochs, overrides)]
    run, _ = load_run_and_recipe(protocol, [*computed, *overrides])  # the task is the same
    faults = Faults()
    Checks(run, 1, frozenset({"data"}), here=here).resolve(faults)
    faults.end()
    epochs_seen = run.optim.steps * run.optim.batch_size / data.samples
    return FineTuning(protocol, run, data, epochs_seen, _export_task(run, task, data.classes))


def _export_task(run: RunConfig, task: Classification, classes: list[str]) -> Task:
    """Return as what the result can be exported: a classifier, or features and a head where no class computes both.

    Raises:
        ConfigError: a classifier could be exported if it pooled otherwise.
    """
    refused: dict[str, ExportError] = {}
    for pool in dict.fromkeys([task.pool, "class_token", "mean_pool"]):
        recipe = parse_recipe(task.model_copy(update={"pool": pool}).recipe())
        source = Source(run.output_dir, run, recipe, 0, {"label_sets": {TRAIN: classes}}, [])
        try:
            plan_parts(source, Wanted("classification"), None)
        except ExportError as error:
            refused[pool] = error
            continue
        if not refused:
            return "classification"
        raise ConfigError(
            f"the result could not be exported as a classifier: {refused[task.pool].what}",
            where=f"task.pool: {task.pool}",
            fix=f"task.pool={pool}",
        )
    return "features"


def _refuse_ranks(protocol: str) -> None:
    adopt_rank_variables(os.environ)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "`finetune` packs, trains and measures in one process, and a launcher has started several",
            where=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            fix=f"m3i-scale launch {protocol} --with deepspeed backbone.from_pretrained=EXPORT "
            "data.sources.train.shards=DIR/train",
        )


def _refuse_run_folder(start: str) -> None:
    folder = Path(start).expanduser()
    if (folder / "checkpoints").is_dir() or (folder / "meta.json").is_file():
        raise ConfigError(
            "this is the folder of a run, and no export",
            where=start,
            fix=f"m3i-scale export {start} --to /data/export, and start from /data/export",
        )


def _refuse_computed(overrides: list[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        taken = next((name for name in _COMPUTED if key == name or key.startswith(name + ".")), None)
        if taken is not None:
            raise ConfigError(
                f"{key} has no effect: `finetune` takes it from {_COMPUTED[taken]}",
                where=override,
                fix="leave it out, or train a run file with a task by `m3i-scale train`",
            )


def _sources(data: Labelled) -> list[str]:
    """Return overrides of the data, in place of all that the run file has."""
    validation = {} if data.validation is None else {"val": {"shards": str(data.validation)}}
    return [
        f"data.sources={json.dumps({TRAIN: {'shards': str(data.train)}})}",
        f"data.validation={json.dumps(validation)}",
    ]


def _length(
    run: RunConfig, published: OptimConfig, data: Labelled, epochs: int | None, overrides: list[str]
) -> list[str]:
    """Return overrides of all that depends on the number of images: the warm-up keeps its share of the steps.

    Args:
        run: the run, whose steps are not known yet.
        published: what the protocol says of them.
        data: the images.
        epochs: that are given.
        overrides: that are given.
    """
    given = dict(override.partition("=")[::2] for override in overrides)
    optim, steps = run.optim, published.steps
    with contextlib.suppress(ValueError):  # what is no number is refused with the whole run file
        steps = int(given.get("optim.steps", steps))
    if epochs is not None and "optim.steps" in given:
        raise ConfigError("--epochs has no effect beside optim.steps", where="optim.steps", fix="leave one of them out")
    computed = []
    if epochs is None and run.protocol is not None:
        epochs = run.protocol.epochs
    if "optim.steps" not in given and epochs is not None:
        steps = max(1, round(epochs * data.samples / optim.batch_size))
        computed.append(f"optim.steps={steps}")
    if "optim.warmup_steps" not in given:
        share = published.warmup_steps / published.steps
        computed.append(f"optim.warmup_steps={min(round(share * steps), steps - 1)}")
    if data.validation is not None:
        every = min(max(1, round(data.samples / optim.batch_size)), steps)
        computed.append(f"evaluation.every_steps={every}")
    return computed


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
    """Export the trained classifier, measure it on the images for evaluation, and write and return the result."""
    run = prepared.run
    folder = run.output_dir / "classifier"
    weights: Any = "student" if run.task is None or run.task.ema is None else "momentum"
    tell(f"exporting into {folder}, as {prepared.export_task}")
    facts = export(run.output_dir, folder, weights, wanted=Wanted(prepared.export_task), overwrite=True)
    result = prepared.facts() | {
        "step": facts["step"],
        "weights": weights,
        "export": str(folder),
        "export_task": prepared.export_task,
        "top_1": None,
    }
    if prepared.data.validation is not None:
        tell(f"measuring on {prepared.data.validation}")
        document = evaluate(folder, str(prepared.data.validation), measures=("classifier",))
        write_json(run.output_dir / "evaluation.json", document)
        figures = document["measures"]["classifier"]
        result |= {"top_1": 100 * figures["top-1"]["value"], "figures": figures}
    write_json(run.output_dir / RESULT, result)
    return result


def _top_1(figures: dict[str, Any]) -> str:
    top = figures["top-1"]
    value, low, high, chance = (100 * top[name] for name in ("value", "low", "high", "chance"))
    return f"top_1: {value:.2f} % (95 % interval {low:.2f} to {high:.2f}; by chance {chance:.2f})"


def lines_of(document: dict[str, Any]) -> list[str]:
    """Return a plan or a result as lines for people: what was published, and what differs, beside the figure."""
    lines = []
    for key, value in document.items():
        if key == "published" and value is not None:
            lines.append(f"published: {value['number']:g} % top-1 by {value['model']} ({value['source']})")
        elif key == "published":
            lines.append("published: nothing by this protocol")
        elif key == "deviations":
            lines += [f"deviation: {text}" for text in value]
        elif key == "sources":
            lines += [f"{name}: {shards}" for name, shards in value.items()]
        elif key == "top_1":
            lines.append("top_1: there are no images to evaluate" if value is None else _top_1(document["figures"]))
        elif isinstance(value, str | int | float):
            lines.append(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    return lines
