"""Command line: one verb per command, without logic."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from m3i_scale import __version__
from m3i_scale.checkpoint_tools.commands import checkpoint_app
from m3i_scale.elastic.doctor.doctor_command import doctor
from m3i_scale.errors import (
    ERROR_FILE,
    EXIT_FAILED,
    EXIT_USER_ERROR,
    ConfigError,
    ErrorCollector,
    UserError,
    save_error,
)
from m3i_scale.evaluation.command_line import compare, evaluate
from m3i_scale.evaluation.embed_command import embed
from m3i_scale.exports.export_command import export
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
from m3i_scale.tasks.init_command import init
from m3i_scale.train_command import TrainCommand, train

PANELS = {
    "Data": ("init", "shards"),
    "Train": ("train", "check", "plan", "doctor", "launch", "stop", "watch"),
    "Results": ("report", "checkpoint", "export", "evaluate", "embed", "compare", "finetune"),
    "Reference": ("recipes", "backbones", "config"),
}
"""Commands by panel of `--help`, in the printed order."""


class _CommandGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of `PANELS`."""
        order = [name for names in PANELS.values() for name in names]
        return sorted(super().list_commands(ctx), key=order.index)


app = typer.Typer(
    cls=_CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pretrain vision backbones with labels, captions and unlabeled images, from one CPU to many GPU nodes. "
    "Exit codes: 0 success, 1 failure, 2 invalid input, 75 stopped by a signal after saving (rerun the command to "
    "resume), 130 interrupted.",
)
_ERRORS = wide_console(stderr=True, soft_wrap=True)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"m3i-scale {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Declare the options that do not belong to a command."""


@app.command(epilog="Example: m3i-scale backbones vit-g/14 internimage-h")
def backbones(
    names: Annotated[list[str] | None, typer.Argument(help="Presets; default: all.")] = None, as_json: AsJson = False
) -> None:
    """List the backbone presets: parameters, compute, tokens and image size. Set one with `backbone.preset=NAME`."""
    from m3i_scale.backbones import describe_presets

    rows = describe_presets(names or [])
    print_result(as_json, rows, lambda: _backbone_table(rows))


def _backbone_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        *("preset", "input", "token", "mask", "tokens", "width", "layers", "parameters", "GMAC"),
        box=None,
        caption="input: image size; token and mask: patch and mask-cell size, in pixels; parameters in millions; GMAC: "
        "billions of multiply-adds per image",
    )
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "preset" else "right"
    for row in rows:
        sides = [str(row[key]) for key in ("image_size", "patch_size", "mask_cell", "tokens", "width", "layers")]
        table.add_row(row["name"], *sides, f"{row['parameters'] / 1e6:,.1f}", f"{row['gmac']:.1f}")
    return table


@app.command(epilog="Example: m3i-scale check run.yaml --ranks 64 --json")
def check(
    run: RunFile,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks; also validates batch size and data streams.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Validate a run without starting it, and print its summary. Exit code 2 if there are errors.

    Valid settings that are probably mistakes are warnings, which do not change the exit code. `shards check` reads the
    samples.
    """
    from m3i_scale.exports.dual_encoder import zero_shot_warnings
    from m3i_scale.run.check import examine
    from m3i_scale.run.run_warnings import warnings_of
    from m3i_scale.run.summary import summary_of_check
    from m3i_scale.tasks.packed_folders import RunFolders

    folders = RunFolders(run, overrides)
    overrides = folders.overrides
    checked = examine(run, overrides, ranks, folders.facts)
    errors = ErrorCollector()
    errors.errors = checked.errors
    unpacked = checked.unpacked_counts
    warnings = folders.warnings + warnings_of(run, overrides, ask_servers=not errors.errors, unpacked=unpacked)
    if (ready := checked.resolved) is not None:
        warnings += zero_shot_warnings(ready.run, ready.recipe, ready.vocab_size or 0)
    if as_json:
        print_json({"errors": [error.to_json() for error in errors.errors], "warnings": warnings})
        if errors.errors:
            raise typer.Exit(EXIT_USER_ERROR)
        return
    console = wide_console(soft_wrap=True)
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    errors.raise_any()
    for line in (*folders.lines(), *summary_of_check(checked, ranks), "OK: the configuration is valid"):
        console.print(line, markup=False, highlight=False)


@app.command(epilog="Example: m3i-scale config data.augment")
def config(
    section: Annotated[str | None, typer.Argument(help="Section, e.g. `optim` or `data.augment`.")] = None,
    overrides: Overrides = None,
    resolved: Annotated[
        str | None, typer.Option(metavar="RUN", help="Print the values of this config file or built-in config instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the config sections, or the fields of one section with type, default and meaning.

    With --resolved RUN, print the config of a run: `extends` and overrides applied, defaults filled in, secrets
    redacted. The recipe is printed as written; `check` validates it.
    """
    if resolved is not None:
        return _print_resolved(resolved, [*([section] if section else []), *(overrides or [])], as_json)
    from m3i_scale.config import known_runs
    from m3i_scale.config.fields import describe_section, section_tables, top_sections

    if section is None:
        rows = top_sections()
        return print_result(as_json, dict(rows), lambda: _section_list(rows))
    if section in known_runs() or section.endswith((".yaml", ".yml")) or os.sep in section:
        raise ConfigError(f"'{section}' is a run, not a config section", fix=f"m3i-scale config --resolved {section}")
    if overrides:
        raise ConfigError(f"{overrides[0]} has no effect without --resolved", fix="add --resolved RUN, or leave it out")
    more: dict[str, Any] = {}
    if section.partition(".")[0] == "recipe":  # needs torch
        from m3i_scale.objective.recipe import Recipe

        more["recipe"] = Recipe
    docs = describe_section(section, more)
    return print_result(as_json, [doc.document() for doc in docs], lambda: section_tables(docs))


def _section_list(rows: list[tuple[str, str]]) -> Group:
    table = Table("SECTION", "MEANING", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name, meaning in rows:
        table.add_row(Text(name, "bold"), Text(meaning))
    return Group(table, Text("\nFields of a section: m3i-scale config SECTION"))


def _print_resolved(run: str, overrides: list[str], as_json: bool) -> None:
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
    run: Annotated[str, typer.Argument(help="Output directory or config file of a run, or a built-in config.")],
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option(help="Wait until the run has ended.")] = True,
    as_json: AsJson = False,
) -> None:
    """Stop a run on all nodes after the current step, with a checkpoint. Rerun the same command to resume."""
    from m3i_scale.run.stop import stop as stop_run

    result = stop_run(run, overrides or [], wait=wait, tell=lambda text: print_line(text, stderr=True))
    print_json(result) if as_json else print_line(result["text"])
    if result["status"] == "ended":
        raise typer.Exit(EXIT_FAILED)


app.command(
    cls=TrainCommand,
    epilog="Example: m3i-scale train m3i_mini data.datasets.photos.path=/data/shards/train output_dir=/data/runs/first",
)(train)
app.command(epilog="Example: m3i-scale init /data/photos --output run.yaml")(init)
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
_registered: list[Any] = [*app.registered_commands, *app.registered_groups]
for _command in _registered:
    _name = _command.name or _command.callback.__name__
    _command.rich_help_panel = next(panel for panel, names in PANELS.items() if _name in names)


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
    leave_out_accelerator_warning()
    try:
        _check_dotted_options(sys.argv[1:])
        app()
    except UserError as error:
        adopt_rank_variables(os.environ)
        ranks = os.environ.get("WORLD_SIZE", "1") != "1"
        if ERROR_FILE in os.environ:
            save_error(error, Path(os.environ[ERROR_FILE]))
        _ERRORS.print(_format_error(error, os.environ.get("RANK", "?") if ranks else None))
        sys.exit(error.exit_code)


def _format_error(error: UserError, rank: str | None) -> Text:
    """Return a message that rank 0 prints in full and others on one line. One call prints it, so lines do not mix. If
    not all ranks are known to have the error, each prints all of it, on one line."""
    head = Text("error: " if rank is None else f"[rank {rank}] error: ", style="bold red")
    if rank in (None, "0"):
        text = str(error)
    elif error.everywhere:
        text = f"{error.what} (see rank 0)"
    else:
        text = "; ".join(line.strip() for line in str(error).splitlines())
    return Text.assemble(head, Text(text, style="default"))
