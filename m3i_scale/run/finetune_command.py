"""`m3i-scale finetune` has a command per task. What takes long to import is imported when a command is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m3i_scale.data.options import AsJson
from m3i_scale.errors import EXIT_PREEMPTED, ConfigError
from m3i_scale.output import leave_out_accelerator_warning, print_json, wide_console

finetune_app = typer.Typer(
    no_args_is_help=True, help="Fine-tune an export by a published protocol, and measure what it is worth."
)


@finetune_app.callback()
def tasks() -> None:
    """Hold the options of no task."""


@finetune_app.command(
    epilog="Example: m3i-scale finetune classification /data/export --data /data/birds output_dir=/data/runs/birds"
)
def classification(
    start: Annotated[
        str, typer.Argument(metavar="EXPORT", help="An exported folder, or any of backbone.from_pretrained.")
    ],
    data: Annotated[
        Path, typer.Option(help="train/CLASS/… and val/CLASS/…; shards in train and val; or a folder of save_to_disk.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    protocol: Annotated[str, typer.Option(help="The name of a built-in one, or a run file with a task.")] = "finetune",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Over the training images; default: the protocol's.")
    ] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Where images are packed into, once; default: output_dir/shards.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell protocol, deviations, steps, memory and hours of one device.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--hardware", help="Of --dry-run: h100, a100 or cpu; default: h100.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a classifier on one device, export it to output_dir/classifier, and measure it.

    The same command goes on with a run that was stopped.

    Several GPUs or hosts: m3i-scale launch PROTOCOL --with deepspeed … backbone.from_pretrained=EXPORT
    data.sources.train.shards=/data/shards/train
    """
    if dry_run:
        leave_out_accelerator_warning()
    elif device is not None:
        raise ConfigError(
            "--hardware has no effect without --dry-run", where=f"--hardware {device}", fix="leave it out"
        )
    from m3i_scale.run.finetune import lines_of, measure, planned, prepare_classification

    prepared = prepare_classification(
        start, data, protocol, overrides or [], epochs=epochs, shards=shards, here=not dry_run
    )
    if dry_run:
        document = planned(prepared, device or "h100")
    else:
        from m3i_scale.run.train import start as train_run
        from m3i_scale.run.train import tell

        prepared.data.pack(tell)
        if train_run(prepared.run) == "preempted":
            raise typer.Exit(EXIT_PREEMPTED)
        document = measure(prepared, tell)
    if as_json:
        print_json(document)
    else:
        wide_console().print("\n".join(lines_of(document)), markup=False, highlight=False)
