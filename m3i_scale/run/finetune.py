"""Put the run file of `m3i-scale finetune` together, of a protocol, an export and labelled images."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from m3i_scale.config import Classification, OptimConfig, RunConfig, Task, load_run
from m3i_scale.downstream.labelled import Labelled, find_labelled
from m3i_scale.downstream.unpacked import TRAIN
from m3i_scale.errors import ConfigError, ExportError, Faults
from m3i_scale.hub.source import Source
from m3i_scale.hub.write import Task as ExportTask
from m3i_scale.hub.write import Wanted, plan_parts
from m3i_scale.objective.recipe import load_run_and_recipe, parse_recipe
from m3i_scale.rank_variables import adopt_rank_variables
from m3i_scale.run.check import Checks
from m3i_scale.text import told_differences

TaskName = Literal["classification", "segmentation"]
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
class Outcome:
    """Says what comes of a task."""

    model: str
    """The folder of the export, and the measure of `evaluate`."""
    metric: str
    """The figure, as `evaluate` and `protocol.published` name it."""


OUTCOMES: dict[TaskName, Outcome] = {
    "classification": Outcome("classifier", "top-1"),
    "segmentation": Outcome("segmenter", "mIoU"),
}


@dataclass(frozen=True)
class FineTuning:
    """Holds a run file that is complete but for shards that are still to be made."""

    task: TaskName
    protocol: str
    run: RunConfig
    data: Labelled
    export_task: ExportTask
    """As what the result is exported."""

    @property
    def outcome(self) -> Outcome:
        """Return what comes of the task."""
        return OUTCOMES[self.task]

    @property
    def epochs(self) -> float:
        """Return how often an image for training is seen."""
        return self.run.optim.steps * self.run.optim.batch_size / self.data.samples

    def facts(self) -> dict[str, Any]:
        """Return what a result cannot be read without."""
        run = self.run
        of_protocol = run.protocol
        published = None if of_protocol is None else of_protocol.published
        stated = [] if of_protocol is None else of_protocol.deviations
        return {
            "task": self.task,
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
        """Return where the run is not as the file of the protocol has it; its length counts in what that states."""
        followed = load_run(self.protocol)
        differences = [
            told
            for part, fields in _FOLLOWED.items()
            for told in told_differences(
                part, *(getattr(run, part).model_dump(mode="json", include=fields) for run in (followed, self.run))
            )
        ]
        epochs, steps = (None, None) if followed.protocol is None else followed.protocol.length
        # Steps are whole: they may be off by a half.
        if epochs is not None and abs(self.epochs - epochs) * self.data.samples > self.run.optim.batch_size:
            differences.append(f"epochs was {epochs}, is {self.epochs:.4g}")
        if steps is not None and self.run.optim.steps != steps:
            differences.append(f"steps was {steps}, is {self.run.optim.steps}")
        if followed.deepspeed != self.run.deepspeed:
            differences.append(f"deepspeed was {followed.deepspeed}, is {self.run.deepspeed}")
        return differences


def prepare(
    task_name: TaskName,
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
        task_name: what is trained.
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
    if task is None or task.kind != task_name:
        raise ConfigError(
            f"the protocol trains no {OUTCOMES[task_name].model}",
            where=f"--protocol {protocol}",
            fix=f"one with task: {{kind: {task_name}}}",
        )
    packed, masks = shards or run.output_dir / "shards", task_name == "segmentation"
    data = find_labelled(folder, packed, run.output_dir / "index", masks=masks)
    if shards is not None and not data.train.is_relative_to(shards):
        raise ConfigError(
            "--shards has no effect: the data are in shards", where=f"--data {folder}", fix="leave it out"
        )
    computed = [*first, *_sources(data), *_length(run, load_run(protocol).optim, data, epochs, overrides)]
    run, _ = load_run_and_recipe(protocol, [*computed, *overrides])  # the task is the same
    faults = Faults()
    Checks(run, 1, frozenset({"data"}), here=here).resolve(faults)
    faults.end()
    return FineTuning(task_name, protocol, run, data, _export_task(run, task, task_name, data.classes))


def _export_task(run: RunConfig, task: Task, name: TaskName, classes: list[str]) -> ExportTask:
    """Return as what the result can be exported: as its task's, or as features and a head where no class computes both.

    Raises:
        ConfigError: a classifier could be exported if it pooled otherwise.
    """
    refusal = _refusal(run, task, name, classes)
    if refusal is None:
        return name
    if not isinstance(task, Classification):
        return "features"
    for pool in ("class_token", "mean_pool"):
        if _refusal(run, task.model_copy(update={"pool": pool}), name, classes) is None:
            raise ConfigError(
                f"the result could not be exported as a {OUTCOMES[name].model}: {refusal.what}",
                where=f"task.pool: {task.pool}",
                fix=f"task.pool={pool}",
            )
    return "features"


def _refusal(run: RunConfig, task: Task, name: TaskName, classes: list[str]) -> ExportError | None:
    """Return why no class computes what the task trains; None where one does."""
    source = Source(run.output_dir, run, parse_recipe(task.recipe()), 0, {"label_sets": {TRAIN: classes}}, [])
    try:
        plan_parts(source, Wanted(name), None)
    except ExportError as error:
        return error
    return None


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
    if "optim.steps" not in given:
        stated = (None, None) if run.protocol is None else run.protocol.length
        of_epochs, of_steps = (epochs, None) if epochs is not None else stated
        if of_epochs is not None:
            steps = max(1, round(of_epochs * data.samples / optim.batch_size))
        steps = of_steps or steps
        computed.append(f"optim.steps={steps}")
    if "optim.warmup_steps" not in given:
        share = published.warmup_steps / published.steps
        computed.append(f"optim.warmup_steps={min(round(share * steps), steps - 1)}")
    if data.validation is not None:
        every = min(max(1, round(data.samples / optim.batch_size)), steps)
        computed.append(f"evaluation.every_steps={every}")
    return computed
