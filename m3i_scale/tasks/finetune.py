"""Config of `m3i-scale finetune`, assembled from a protocol, an export and labeled images."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from safetensors.torch import save_file

from m3i_scale.backbones.build import backbone_config, backbone_source, build_backbone, draw_first_values
from m3i_scale.checkpoint.layout import MANIFEST
from m3i_scale.config import BackboneConfig, OptimConfig, RunConfig, load_run
from m3i_scale.data.mixing import check_shares
from m3i_scale.errors import ConfigError, ExportError
from m3i_scale.exports.export import export
from m3i_scale.exports.push import PROVENANCE
from m3i_scale.exports.source import Source, find_source
from m3i_scale.exports.write import ExportContents, plan_parts
from m3i_scale.exports.write import Task as ExportTask
from m3i_scale.files import atomic_dir, read_json, sha256_of, sha256_of_json
from m3i_scale.host.output_dir import check_output_dir, is_run_folder, lock_directory
from m3i_scale.objective.build import initialize_module
from m3i_scale.objective.recipe import load_run_and_recipe, parse_recipe
from m3i_scale.rank_variables import adopt_rank_variables
from m3i_scale.run.check import resolve_run
from m3i_scale.run.data_checks import DataFacts
from m3i_scale.run.resume import check_resume, find_resume
from m3i_scale.run.setup import ResolvedRun
from m3i_scale.tasks.base import Task, steps_of
from m3i_scale.tasks.finetune_result import FineTuning, repeat_threshold
from m3i_scale.tasks.labelled import Labelled, find_labelled
from m3i_scale.tasks.subset import Subset
from m3i_scale.tasks.unpacked import TRAIN

STEPS_APART = 20
"""Minimum number of steps between evaluations, which otherwise happen once per epoch. They do not read more images
than the training steps in between: with few images, evaluation would take longer than training."""
_COMPUTED = {
    "backbone.from_pretrained": "EXPORT",
    "backbone.preset": "EXPORT",
    "data.datasets": "--data",
    "data.validation": "--data",
    "protocol": "--protocol",
}
"""Keys that the command sets, and the argument that determines each."""
_REPEATED = f"data.datasets.{TRAIN}.repeat_threshold"
"""The only field of the training dataset that a protocol can set."""


def prepare(
    kind: str,
    start: str,
    folder: Path,
    protocol: str,
    overrides: list[str],
    *,
    epochs: int | None,
    shards: Path | None,
    here: bool,
    subset: Subset | None = None,
    skip_bad: bool = False,
    random_weights: bool = False,
) -> FineTuning:
    """Assemble the config and validate as much as possible before images are read.

    Args:
        start: an export, or any value of `backbone.from_pretrained`. A run or checkpoint is exported first.
        folder: labeled images.
        protocol: config file with a task, or the name of a built-in one.
        overrides: `section.key=value`, applied last.
        epochs: default: the protocol's length.
        shards: folder for packed images. Default: `shards` in the output directory.
        here: whether to train on this machine.
        random_weights: initialize the architecture of `start` randomly.
    """
    _check_one_rank(protocol)
    _check_not_computed(overrides)
    # The number of steps is still unknown, so use one that every step setting fits into. The shards are unknown too.
    unknown = ["optim.steps=1000000000", "optim.warmup_steps=0"]
    source = f"data.datasets.{TRAIN}.path={json.dumps(str(folder))}"
    run, _ = load_run_and_recipe(protocol, [*_start(start), source, *overrides, *unknown])
    check_output_dir(run.output_dir)
    task = run.task
    if task is None or task.kind != kind:
        raise ConfigError(
            f"the protocol is not for {kind}",
            where=f"--protocol {protocol}",
            fix=f"use a protocol with task: {{kind: {kind}}}",
        )
    packed, index = shards or run.output_dir / "shards", run.output_dir / "index"
    data = find_labelled(folder, packed, index, task.labels_file, subset=subset, skip_bad=skip_bad)
    for option, given in (("--shards", shards is not None), ("--skip-bad", skip_bad)):
        if given and not data.train.is_relative_to(packed):
            raise ConfigError(
                f"{option} has no effect: the data are shards", where=f"--data {folder}", fix="leave it out"
            )
    _check_boxes(task, data)
    first_weights = _exported(start, run.output_dir)
    if random_weights:
        first_weights = str(random_start(first_weights, run.output_dir / "start", run.seed))
    sources = _sources(data, repeat_threshold(run))
    # `start` may be a run, which has no model config.
    run = run.model_copy(update={"backbone": run.backbone.model_copy(update={"from_pretrained": first_weights})})
    followed = load_run(protocol)
    computed = [*_start(first_weights), *sources, *_length(run, followed.optim, data, epochs, overrides)]
    run, _ = load_run_and_recipe(protocol, [*computed, *overrides])  # the task is the same
    _check_image_count(run, data)
    run = run.model_copy(update={"deepspeed": resolve_finetuning(run, data, here=here).run.deepspeed})
    export_task = _export_task(run, task, data.classes)
    return FineTuning(task, protocol, followed, run, data, export_task, subset, start if random_weights else None)


def resolve_finetuning(run: RunConfig, data: Labelled, *, here: bool) -> ResolvedRun:
    """Validate the complete config, even if the shards do not exist yet."""
    if data.source is None:
        return resolve_run(run, 1, here=here)
    datasets = (*run.data.datasets.values(), *run.data.validation.values())
    facts = DataFacts(run, {TRAIN: data.classes}, unpacked=frozenset(dataset.path for dataset in datasets))
    if data.categories is not None and data.categories.format == "lvis":
        facts.image_counts = [category.image_count or 0 for category in data.categories.categories]
    return resolve_run(run, 1, here=here, unpacked=facts)


def pack(run: RunConfig, data: Labelled, tell: Callable[[str], None], *, skip_bad: bool) -> None:
    """Pack the images, unless they are in shards, with a lock on the output directory. Check first that it has no
    checkpoint of a different run."""
    if data.source is None:
        return
    with lock_directory(run.output_dir):
        checkpoint, _ = find_resume(run, contents=False)  # training reads every byte
        if checkpoint is not None:
            check_resume(resolve_finetuning(run, data, here=False), checkpoint, 1)
        data.pack(tell, skip_bad=skip_bad)


def _export_task(run: RunConfig, task: Task, classes: list[str]) -> ExportTask:
    """Return the export type of the result: the task, or features and a head if no standard class computes both. For
    a sweep, the best head and whether a class supports it are unknown yet."""
    if task.chooses_head:
        return "features"
    refusal = _refusal(run, task, classes)
    if refusal is None:
        return cast(ExportTask, task.kind)
    for field, value in ((field, value) for field, values in task.exportable.items() for value in values):
        if _refusal(run, task.model_copy(update={field: value}), classes) is None:
            install = "" if find_spec("timm") is not None else "run `pip install -e '.[timm]'`, or "
            raise ConfigError(
                f"the result cannot be exported as a {task.model}: {refusal.what}",
                where=f"task.{field}: {getattr(task, field)}",
                fix=f"{install}set task.{field}={value}",
            )
    return "features"


def _refusal(run: RunConfig, task: Task, classes: list[str]) -> ExportError | None:
    """Return why no standard class computes the task, or None if one does."""
    source = Source(run.output_dir, run, parse_recipe(task.recipe()), 0, {"label_sets": {TRAIN: classes}}, [])
    try:
        plan_parts(source, ExportContents(cast(ExportTask, task.kind)), None)
    except ExportError as error:
        return error
    return None


def _check_image_count(run: RunConfig, data: Labelled) -> None:
    check_shares(run.data, micro_batch_size=run.optim.micro_batch_size, world_size=1)
    check_streams(run, data.read)


def check_streams(run: RunConfig, images: int) -> None:
    """Check that each stream has an image."""
    streams, batch = run.data.streams, run.optim.micro_batch_size
    if images < streams:
        most = max(number for number in range(1, max(images, 1) + 1) if batch % number == 0)
        raise ConfigError(
            f"data.streams must be at most {most} for {images} training images, got {streams}",
            where=f"data.streams: {streams}",
            fix=f"set data.streams={most}",
        )


def _check_boxes(task: Task, data: Labelled) -> None:
    if data.categories is None:
        return
    counts = [category.image_count for category in data.categories.categories]
    task.check_image_counts(None if None in counts else [count or 0 for count in counts])
    if parse_recipe(task.recipe()).reads == "boxes_and_masks" and data.without_mask != "none":
        without = "no object has" if data.without_mask == "all" else "some objects do not have"
        raise ConfigError(
            f"the head predicts masks, but {without} one",
            where="task.head.masks",
            fix="set task.head.masks=false",
        )


def _check_one_rank(protocol: str) -> None:
    adopt_rank_variables(os.environ)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "`finetune` runs in one process, but a launcher started several",
            where=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            fix=f"run `m3i-scale launch {protocol} --with deepspeed backbone.from_pretrained=EXPORT "
            "data.datasets.train.path=DIR/train`",
        )


def _start(start: str) -> list[str]:
    return ["backbone.preset=null", f"backbone.from_pretrained={json.dumps(start)}"]


def _exported(start: str, output_dir: Path) -> str:
    """Return an export of the latest valid checkpoint if `start` is a run (created once), otherwise `start`."""
    folder = Path(start).expanduser()
    if not is_run_folder(folder):
        return start
    checkpoint = find_source(folder).checkpoint
    exported = output_dir / "start" / checkpoint.name
    file = exported / PROVENANCE
    made_of = read_json(file).get("checkpoint_manifest_sha256") if file.is_file() else None
    if made_of != sha256_of(checkpoint / MANIFEST):
        export(checkpoint, exported)
    return str(exported)


def _check_not_computed(overrides: list[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        taken = next((name for name in _COMPUTED if key == name or key.startswith(name + ".")), None)
        if taken is not None and key != _REPEATED:
            raise ConfigError(
                f"{key} has no effect: `finetune` takes it from {_COMPUTED[taken]}",
                where=override,
                fix="leave it out, or train a config file with a task by `m3i-scale train`",
            )


def _sources(data: Labelled, repeats: float | None) -> list[str]:
    """Return overrides that replace all data settings of the config except `repeat_threshold`."""
    validation = {} if data.validation is None else {"val": {"path": str(data.validation)}}
    repeated = {} if repeats is None else {"repeat_threshold": repeats}
    return [
        f"data.datasets={json.dumps({TRAIN: {'path': str(data.train), **repeated}})}",
        f"data.validation={json.dumps(validation)}",
    ]


def _length(
    run: RunConfig, published: OptimConfig, data: Labelled, epochs: int | None, overrides: list[str]
) -> list[str]:
    """Return overrides of settings that depend on the number of images. Warm-up and milestones keep their fraction of
    the steps, and every evaluation reads all evaluation images once. The learning rate follows the backbone width. The
    number of steps in `run` is still unknown; `published` has the protocol's settings."""
    given = dict(override.partition("=")[::2] for override in overrides)
    optim, steps = run.optim, published.steps
    with contextlib.suppress(ValueError):  # invalid numbers are reported with the complete config
        steps = int(given.get("optim.steps", steps))
    if epochs is not None and "optim.steps" in given:
        raise ConfigError(
            "--epochs cannot be combined with optim.steps", where="optim.steps", fix="leave out one of them"
        )
    computed = []
    if "optim.steps" not in given:
        if epochs is not None:
            steps = steps_of(epochs, data.read, optim.batch_size)
        elif run.protocol is not None:
            steps = run.protocol.steps_for(data.read, optim.batch_size)
        computed.append(f"optim.steps={steps}")
    if run.protocol is not None and run.protocol.lr_width is not None and "optim.lr" not in given:
        rate = run.protocol.lr_for(published.lr, backbone_config(run.backbone).hidden_size)
        computed.append(f"optim.lr={rate!r}")
    if "optim.warmup_steps" not in given:
        share = published.warmup_steps / published.steps
        computed.append(f"optim.warmup_steps={min(round(share * steps), steps - 1)}")
    schedule = published.schedule.fitted(published.steps, steps)
    if schedule != published.schedule and not any(key.startswith("optim.schedule") for key in given):
        computed.append(f"optim.schedule={json.dumps(schedule.model_dump(mode='json'))}")
    if data.validation is not None:
        every = min(max(STEPS_APART, round(max(data.read, data.evaluated) / optim.batch_size)), steps)
        batches = max(1, math.ceil(data.evaluated / optim.micro_batch_size))
        computed += [f"evaluation.every_steps={every}", f"evaluation.batches={batches}"]
    return computed


_PROCESSOR = "preprocessor_config.json"


def random_start(start: str, folder: Path, seed: int) -> Path:
    """Return a model folder below `folder` with random weights, initialized as for pre-training from scratch, and the
    architecture of `start`, any value of `backbone.from_pretrained`. The weights depend only on architecture and seed;
    an existing folder is reused."""
    section = BackboneConfig(from_pretrained=start)
    config, source = backbone_config(section), backbone_source(section)
    shape = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    made = folder / f"random-{sha256_of_json(shape)[:12]}-{seed}"
    if made.is_dir():
        return made
    backbone = build_backbone(config)
    draw_first_values(backbone, initialize_module, seed=seed)
    with atomic_dir(made) as unfinished:
        config.save_pretrained(unfinished)
        save_file(backbone.model.state_dict(), unfinished / "model.safetensors", {"format": "pt"})
        if (source.folder / _PROCESSOR).is_file():
            shutil.copy(source.folder / _PROCESSOR, unfinished)  # has mean and std of the images
    return made
