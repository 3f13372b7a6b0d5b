"""Command line: one verb per command, without logic."""

from __future__ import annotations

import os
import re
import sys
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from m3i_scale import __version__
from m3i_scale.checkpoint_tools.commands import checkpoint_app
from m3i_scale.elastic.doctor.doctor_command import doctor
from m3i_scale.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError, ErrorCollector, UserError
from m3i_scale.evaluate.command_line import compare, evaluate
from m3i_scale.evaluate.embed_command import embed
from m3i_scale.export.export_command import export
from m3i_scale.launch_command import launch
from m3i_scale.options import AsJson, Overrides, RunFile
from m3i_scale.output import (
    leave_out_accelerator_warning,
    print_json,
    print_line,
    print_result,
    reserve_stdout,
    wide_console,
)
from m3i_scale.plan.plan_command import plan
from m3i_scale.rank_variables import adopt_rank_variables
from m3i_scale.report.commands import recipes_app, report, watch
from m3i_scale.shards.commands import shards_app
from m3i_scale.tasks.finetune_command import finetune_app

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="M3I pre-training of vision backbones with DeepSpeed. Exit codes: 0 done, 2 a mistake that the message "
    "explains, 75 stopped by a signal after saving (start again to go on).",
)
_ERRORS = wide_console(stderr=True, soft_wrap=True)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"m3i-scale {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    """Declare the options that do not belong to a command."""


@app.command(epilog="Example: m3i-scale backbones vit-g/14 internimage-h")
def backbones(
    names: Annotated[list[str] | None, typer.Argument(help="Only these presets.")] = None, as_json: AsJson = False
) -> None:
    """Print the sizes of `backbone.preset`: parameters, multiply-adds, tokens, input size."""
    from m3i_scale.backbones import describe_presets

    rows = describe_presets(names or [])
    print_result(as_json, rows, lambda: _backbone_table(rows))


def _backbone_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        *("preset", "input", "token", "mask", "tokens", "width", "layers", "parameters", "GMAC"),
        box=None,
        caption="input, token and mask cell: side in pixels; parameters: millions",
    )
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "preset" else "right"
    for row in rows:
        sides = [str(row[key]) for key in ("image_size", "patch_size", "mask_cell", "tokens", "width", "layers")]
        table.add_row(row["name"], *sides, f"{row['parameters'] / 1e6:,.1f}", f"{row['gmac']:.1f}")
    return table


@app.command(
    epilog="Example: deepspeed --no_local_rank --num_gpus 8 --module m3i_scale train m3i "
    "data.datasets.main.path=/data/shards/train output_dir=/data/runs/first"
)
def train(
    run: RunFile,
    overrides: Overrides = None,
) -> None:
    """Train, or resume from the latest valid checkpoint. Start it with any launcher; alone it runs on one rank."""
    from m3i_scale.objective.recipe import load_run_and_recipe

    try:
        config, _ = load_run_and_recipe(run, overrides)  # before DeepSpeed is imported and builds anything
    except UserError:
        leave_out_accelerator_warning()
        from m3i_scale.run.check import check_run

        adopt_rank_variables(os.environ)
        world = os.environ.get("WORLD_SIZE", "")
        ranks = int(world) if world.isdecimal() else 0
        check_run(run, overrides, ranks or None)  # which also reports all other errors
        raise
    from m3i_scale.evaluate.pictures.hook import make_pictures
    from m3i_scale.run.run_warnings import repeated_overrides
    from m3i_scale.run.train import start

    if start(config, repeated_overrides(overrides or []), [make_pictures]) == "preempted":
        raise typer.Exit(EXIT_PREEMPTED)


@app.command(epilog="Example: m3i-scale check run.yaml --ranks 64 --json")
def check(
    run: RunFile,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="That it will have: batch and streams, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """List all errors that `train` finds before it reads samples. Start nothing. Exit code 2 if there are errors.

    A valid setting that is probably a mistake is a warning, and does not change the exit code: a learning rate of SGD,
    a setting without effect, validation on training data. `shards check` reads the samples.
    """
    leave_out_accelerator_warning()
    from m3i_scale.config import load_run
    from m3i_scale.run.check import errors_of, stage_lines
    from m3i_scale.run.run_warnings import warnings_of

    errors = ErrorCollector()
    errors.errors = errors_of(run, overrides, ranks)
    warnings = warnings_of(run, overrides, ask_servers=not errors.errors)
    if as_json:
        print_json({"errors": [error.to_json() for error in errors.errors], "warnings": warnings})
        if errors.errors:
            raise typer.Exit(EXIT_USER_ERROR)
    else:
        console = wide_console(soft_wrap=True)
        for warning in warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
        errors.raise_any()
        for line in (*stage_lines(load_run(run, overrides)), "nothing to refuse"):
            console.print(line, markup=False, highlight=False)


@app.command(epilog="Example: m3i-scale config m3i optim.steps=10")
def config(run: RunFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved config: `extends` and overrides applied, defaults filled in, secrets redacted.

    The recipe is printed as written; `check` validates it.
    """
    import yaml

    from m3i_scale.config import load_run
    from m3i_scale.text import redact

    # Recipe classes are not used: they include losses, so they would import torch first.
    values = redact(load_run(run, overrides).model_dump(mode="json"))
    if as_json:
        print_json(values)
    else:
        typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


@app.command(epilog="Example: m3i-scale stop /data/runs/first")
def stop(
    run: Annotated[str, typer.Argument(help="The output folder of a run, its run file, or a built-in name.")],
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option(help="Until the run has ended.")] = True,
    as_json: AsJson = False,
) -> None:
    """Stop a run on all nodes: it finishes its step and saves. Rerun the same command to resume."""
    from m3i_scale.run.stop import stop as stop_run

    result = stop_run(run, overrides or [], wait=wait, tell=lambda text: print_line(text, stderr=True))
    print_json(result) if as_json else print_line(result["text"])
    if result["status"] == "ended":
        raise typer.Exit(EXIT_FAILED)


app.command(epilog="Example: m3i-scale plan m3i_vit_g14 --nodes 2 --ranks-per-node 8 --memory-gib 80")(plan)
app.command(epilog="Example: m3i-scale doctor m3i --hostfile /data/hostfile --interface eth0")(doctor)
app.command(epilog="Example: m3i-scale evaluate /data/export --data /data/shards/val --train-data /data/shards/train")(
    evaluate
)
app.command(epilog="Example: m3i-scale embed /data/export --data /data/photos --output features.parquet")(embed)
app.command(epilog="Example: m3i-scale compare /data/before /data/after --data /data/domain --general /data/other")(
    compare
)
app.command(epilog="Example: m3i-scale export /data/runs/first --output /data/export --weights ema")(export)
app.command(epilog="Example: m3i-scale report /data/runs/first /data/runs/second --output report.html")(report)
app.command(epilog="Example: m3i-scale watch /data/runs/first")(watch)
app.command(epilog="Example: m3i-scale launch m3i --with deepspeed --hostfile /data/hostfile --dry-run")(launch)
app.add_typer(recipes_app, name="recipes")
app.add_typer(shards_app, name="shards")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(finetune_app, name="finetune")


def _check_dotted_options(arguments: list[str]) -> None:
    """Reject options with a dot, such as `--optim.lr 1e-3`: settings have no leading dashes here."""
    for item in arguments:
        match = re.fullmatch(r"--?([A-Za-z_]\w*(?:\.\w+)+)(=.*)?", item, re.DOTALL)
        if match:
            raise ConfigError(f"there is no option {item}", fix=f"write {match[1]}{match[2] or '=VALUE'}")


def main() -> None:
    """Run the command line; a UserError is printed, and its exit code is used."""
    # The `deepspeed` launcher adds --local_rank=N; LOCAL_RANK has the same value.
    sys.argv[1:] = [item for item in sys.argv[1:] if not item.startswith("--local_rank=")]
    if "--json" in sys.argv:
        reserve_stdout()
    try:
        _check_dotted_options(sys.argv[1:])
        app()
    except UserError as error:
        adopt_rank_variables(os.environ)
        ranks = os.environ.get("WORLD_SIZE", "1") != "1"
        _ERRORS.print(_format_error(error, os.environ.get("RANK", "?") if ranks else None))
        sys.exit(error.exit_code)


def _format_error(error: UserError, rank: str | None) -> Text:
    """Return a message that rank 0 prints in full and others on one line. One call prints it, so lines do not mix. If
    not all ranks are known to have the error, each prints all of it, on one line."""
    head = Text("error: " if rank is None else f"[rank {rank}] error: ", style="bold red")
    if rank in (None, "0"):
        text = str(error)
    elif error.everywhere:
        text = f"{error.what} (rank 0 tells more)"
    else:
        text = "; ".join(line.strip() for line in str(error).splitlines())
    return Text.assemble(head, Text(text, style="default"))
