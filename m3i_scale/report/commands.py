"""`m3i-scale report`, `watch` and `recipes`. Slow imports happen inside the functions."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from m3i_scale.errors import ConfigError
from m3i_scale.options import AsJson, RunFile, writes_to
from m3i_scale.output import print_json, print_line, print_result, wide_console

_PACKAGES = ("plotext", "plotly", "tsdownsample")
"""Packages of the extra `report`."""

recipes_app = typer.Typer(invoke_without_command=True)


@recipes_app.callback(epilog="Example: m3i-scale recipes --json")
def recipes(
    context: typer.Context,
    formula: Annotated[
        bool,
        typer.Option("--formula", help="Print inputs, targets, losses and collapse prevention of each recipe."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the built-in recipes with the data they need. Start one with `m3i-scale train NAME`."""
    from m3i_scale.report.recipe_table import RecipeTable, built_in_rows, chooser_table

    context.obj = as_json
    if context.invoked_subcommand is not None:
        return
    rows = built_in_rows()
    print_result(as_json, rows, lambda: RecipeTable(rows) if formula else chooser_table(rows))


@recipes_app.command("show", epilog="Example: m3i-scale recipes show m3i --output m3i.md")
def show_recipe(
    context: typer.Context,
    name: RunFile,
    output: Annotated[
        Path | None, typer.Option(callback=writes_to, help="Write a Mermaid flowchart to FILE.mmd or FILE.md.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the inputs and targets of one recipe. With --output, also write them as a flowchart."""
    from m3i_scale.objective.recipe import load_run_and_recipe
    from m3i_scale.report.recipe_graph import write_mermaid
    from m3i_scale.report.recipe_table import RecipeTable, describe

    run, recipe = load_run_and_recipe(name)
    row, as_json = describe(run, recipe), as_json or context.obj
    if output is not None:
        write_mermaid(recipe, output)
    print_result(as_json, row, lambda: RecipeTable([row]))
    if output is not None and not as_json:
        print_line(f"flowchart: {output}")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs; several runs are overlaid.")],
    output: Annotated[
        Path, typer.Option(callback=writes_to, help="HTML file to write; an existing one is replaced.")
    ] = Path("report.html"),
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="Output of `evaluate --output` to add to the results in the run folders."),
    ] = None,
    pictures: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of `evaluate --pictures` to add to the pictures in the run folders."),
    ] = None,
    show_it: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file that shows runs during or after training: curves, events, data, checkpoints, results.

    The file is self-contained: it needs no network and no other files.
    """
    _check_installed()
    from m3i_scale.report.page import open_in_browser, write_report

    result = write_report(runs, output, evaluations=evaluation or (), pictures=pictures or ())
    if as_json:
        print_json(result)
    else:
        text = f"{result['report']}: {result['bytes'] / 1e6:.1f} MB in {result['seconds']:.1f} s"
        wide_console().print(text, markup=False, highlight=False)
    if show_it:
        open_in_browser(output)


def watch(
    run: Annotated[Path, typer.Argument(help="Output folder of a run.")],
    every: Annotated[float, typer.Option(min=0.1, metavar="S", help="Polling interval in seconds.")] = 2.0,
) -> None:
    """Show a run in the terminal while it trains: progress, curves, step timings, hosts, warnings. Press q to quit."""
    _check_installed()
    from m3i_scale.report.watch import watch as watch_run

    watch_run(run, every)


def _check_installed() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the packages of `report` and `watch` are not installed: {', '.join(missing)}",
            fix="run `pip install -e '.[report]'`",
        )
