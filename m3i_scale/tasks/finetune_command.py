"""Commands `m3i-scale finetune TASK`. Slow imports happen when a command is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from m3i_scale.errors import EXIT_PREEMPTED, ConfigError
from m3i_scale.options import AsJson, Command, Overrides, expanded, writes_to
from m3i_scale.output import leave_out_accelerator_warning, print_json, print_line, wide_console

if TYPE_CHECKING:
    from m3i_scale.tasks.finetune_result import FineTuning
    from m3i_scale.tasks.subset import Subset

finetune_app = typer.Typer(no_args_is_help=True, help="Fine-tune a model with a published protocol, and evaluate it.")


@dataclass(frozen=True)
class FineTuneOptions:
    """Options of the commands of all tasks."""

    start: Annotated[
        str,
        typer.Argument(metavar="EXPORT", help="Exported folder, or pretrained weights as in backbone.from_pretrained."),
    ]
    data: Annotated[Path, typer.Option(help="Images with annotations; see above.")]
    overrides: Overrides = None
    protocol: Annotated[
        str | None, typer.Option(metavar="RUN", help="Built-in protocol, or config file with a task.")
    ] = None
    epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Training epochs; default: those of the protocol.")
    ] = None
    shards: Annotated[
        Path | None,
        typer.Option(callback=writes_to, help="Folder for the packed images. Default: output_dir/shards."),
    ] = None
    per_class: Annotated[int | None, typer.Option(min=1, metavar="N", help="Train on N images per class.")] = None
    share: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Train on this fraction of the images, of each class if there are class labels."
        ),
    ] = None
    subset_seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Seed of the subset; default: 0.")] = None
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip and count images that cannot be packed.")] = False
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Baseline: start from random weights of the same architecture."),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only print protocol, deviations, and the estimated memory and time."),
    ] = False
    as_json: AsJson = False

    def subset(self) -> Subset | None:
        """Return the subset of the training images; None: all of them."""
        from m3i_scale.tasks.subset import Subset

        if self.per_class is None and self.share is None:
            if self.subset_seed is not None:
                raise ConfigError(
                    "--subset-seed has no effect without --share or --per-class",
                    where=f"--subset-seed {self.subset_seed}",
                    fix="leave it out, or add --share",
                )
            return None
        if self.per_class is not None and self.share is not None:
            raise ConfigError(
                "--per-class cannot be combined with --share", where="--share", fix="leave out one of them"
            )
        if self.share is not None and not 0 < self.share < 1:
            raise ConfigError(
                f"--share must be > 0 and < 1, got {self.share:g}", where="--share", fix="use e.g. --share 0.1"
            )
        return Subset(self.per_class, self.share, self.subset_seed or 0)

    def run(self, task: str, protocol: str) -> None:
        """Train and evaluate, or with `--dry-run` only estimate the cost. `protocol` is the default of the task."""
        if self.dry_run:
            leave_out_accelerator_warning()
        from m3i_scale.run.run_warnings import command_warnings
        from m3i_scale.tasks.finetune import prepare
        from m3i_scale.tasks.finetune_result import planned, result_lines

        protocol, overrides = self.protocol or protocol, self.overrides or []
        prepared = prepare(
            task,
            self.start,
            self.data,
            protocol,
            overrides,
            epochs=self.epochs,
            shards=self.shards,
            here=not self.dry_run,
            subset=self.subset(),
            skip_bad=self.skip_bad,
            random_weights=self.random_weights,
        )
        for warning in command_warnings(prepared.run, protocol, overrides):
            print_line(f"warning: {warning}", stderr=True)
        document = planned(prepared) if self.dry_run else self._measured(prepared)
        if self.as_json:
            print_json(document)
        else:
            wide_console().print("\n".join(result_lines(document)), markup=False, highlight=False)

    def _measured(self, prepared: FineTuning) -> dict[str, Any]:
        """Train unless training is finished, then evaluate."""
        from m3i_scale.evaluation.pictures.hook import make_pictures
        from m3i_scale.run.preflight import check_before_joining
        from m3i_scale.run.train import print_rank0
        from m3i_scale.run.train import start as train_run
        from m3i_scale.tasks.contents import check_contents
        from m3i_scale.tasks.finetune import pack
        from m3i_scale.tasks.finetune_result import data_lines, measure

        data, run = prepared.data, prepared.run
        for line in data_lines(prepared.facts()):
            print_rank0(line)
        check_before_joining()
        pack(run, data, print_rank0, skip_bad=self.skip_bad)
        if not (run.output_dir / "checkpoints").exists():  # otherwise they were checked when the run began
            check_contents(data, prepared.task.labels_file, print_rank0)
        if train_run(run, make_hooks=[make_pictures]) == "preempted":
            raise typer.Exit(EXIT_PREEMPTED)
        return measure(prepared, print_rank0)


@finetune_app.callback()
def tasks() -> None:
    """Provide the command group; the options belong to the tasks."""


def _with_options(*without: str) -> Callable[[Command], Command]:
    """Decorate a command so that its parameter `asked` is replaced by the fields of `FineTuneOptions`."""
    types = get_type_hints(FineTuneOptions, include_extras=True)
    parts = {
        field.name: (types[field.name], inspect.Parameter.empty if field.default is MISSING else field.default)
        for field in fields(FineTuneOptions)
        if field.name not in without
    }
    return lambda command: expanded(command, "asked", parts, FineTuneOptions)


@finetune_app.command(
    epilog="Example: m3i-scale finetune classification /data/export --data /data/birds output_dir=/data/runs/birds"
)
@_with_options()
def classification(asked: FineTuneOptions) -> None:
    """Fine-tune a classifier on one device, export it to output_dir/classifier, and evaluate it.

    Rerun the same command to resume a stopped run. The folder --data contains train/CLASS/… and val/CLASS/…, or shards
    in train and val. Default protocol: finetune.

    For several GPUs or nodes: m3i-scale launch PROTOCOL --with deepspeed … backbone.from_pretrained=EXPORT
    data.datasets.train.path=/data/shards/train
    """
    asked.run("classification", "finetune")


@finetune_app.command(
    epilog="Example: m3i-scale finetune segmentation /data/export --data /data/scenes output_dir=/data/runs/scenes"
)
@_with_options("per_class")
def segmentation(asked: FineTuneOptions) -> None:
    """Fine-tune a segmenter on one device, export it to output_dir/segmenter, and evaluate it.

    Rerun the same command to resume a stopped run. The folder --data contains one of:
    shards with masks in train and val, each with mask_labels.json; images and masks in train/images, train/masks,
    val/images and val/masks; or ADE20k as published. Default protocol: segment.

    For several GPUs or nodes: m3i-scale launch PROTOCOL --with deepspeed … backbone.from_pretrained=EXPORT
    data.datasets.train.path=/data/shards/train
    """
    asked.run("segmentation", "segment")


@finetune_app.command(
    epilog="Example: m3i-scale finetune detection /data/export --data /data/coco output_dir=/data/runs/coco"
)
@_with_options("per_class")
def detection(asked: FineTuneOptions) -> None:
    """Fine-tune a detector on one device, export it to output_dir/detector, and evaluate it.

    Rerun the same command to resume a stopped run. The folder --data contains one of:
    shards with boxes in train and val, each with categories.json; or COCO or LVIS as published, with images and
    annotations/. --data can also be the annotation file for training. Default protocol: detect.

    For several GPUs or nodes: m3i-scale launch PROTOCOL --with deepspeed … backbone.from_pretrained=EXPORT
    data.datasets.train.path=/data/shards/train
    """
    asked.run("detection", "detect")
