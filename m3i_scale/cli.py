"""The door: one verb per command, no logic."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from m3i_scale.config import find_run_file, load_run
from m3i_scale.data.commands import shards_app
from m3i_scale.errors import EXIT_PREEMPTED, UserError
from m3i_scale.output import print_json, reserve_stdout

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="M3I pre-training of vision backbones with DeepSpeed. Exit codes: 0 done, 2 a mistake that the message "
    "explains, 75 stopped by a signal after saving (start again to go on).",
)
_ERRORS = Console(stderr=True, soft_wrap=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


recipes_app = typer.Typer(invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback(epilog="Example: m3i-scale recipes --json")
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """The paper's table, read from the built-in recipes: what predicts what, and how."""
    from m3i_scale.report.recipe_table import RecipeTable, built_in_rows

    context.obj = as_json
    if context.invoked_subcommand is not None:
        return
    rows = built_in_rows()
    if as_json:
        print_json(rows)
    else:
        Console().print(RecipeTable(rows))


@recipes_app.command(epilog="Example: m3i-scale recipes show m3i --svg m3i.svg")
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The name of a built-in recipe, or a run file.")],
    svg: Annotated[Path | None, typer.Option(help="Also draw it into this file.")] = None,
    as_json: Json = False,
) -> None:
    """One recipe as a graph: x → f_θ → f_ψ ↔ f_φ ← y."""
    from m3i_scale.objective.describe import describe
    from m3i_scale.report.recipe_graph import graph_of, read_recipe
    from m3i_scale.report.recipe_svg import write_svg
    from m3i_scale.report.recipe_terminal import render_terminal

    recipe = read_recipe(name)
    graph = graph_of(recipe)
    if svg is not None:
        write_svg(graph, svg)
    if as_json or context.obj:
        print_json(describe(recipe))
    else:
        Console().print(render_terminal(graph))
        if svg is not None:
            Console().print(f"also drawn into {svg}", markup=False, highlight=False)


@app.command(epilog="Example: m3i-scale backbones vit-g/14 internimage-h")
def backbones(
    names: Annotated[list[str] | None, typer.Argument(help="Only these presets.")] = None, as_json: Json = False
) -> None:
    """Sizes of `backbone.preset`: parameters, multiply-adds, tokens, input size."""
    from m3i_scale.backbones.cost import describe_presets
    from m3i_scale.report.backbone_table import backbone_table

    rows = describe_presets(names or [])
    if as_json:
        print_json(rows)
    else:
        Console().print(backbone_table(rows))


@app.command(
    epilog="Example: deepspeed --no_local_rank --num_gpus 8 --module m3i_scale train m3i "
    "data.sources.main.shards=/data/shards/train output_dir=/data/runs/first"
)
def train(
    run: Annotated[str, typer.Argument(help="A run file, or the name of a built-in recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
) -> None:
    """Train, or go on from the newest good checkpoint. Start it with any launcher; alone it runs on one rank."""
    config = load_run(run, overrides)
    from m3i_scale.objective.recipe import parse_recipe

    parse_recipe(config.recipe, where=str(find_run_file(run)))  # before DeepSpeed is imported and builds anything
    from m3i_scale.run.start import start

    if start(config) == "preempted":
        raise typer.Exit(EXIT_PREEMPTED)


@app.command(epilog="Example: m3i-scale evaluate /data/export --data /data/shards/val --train-data /data/shards/train")
def evaluate(
    model_dir: Annotated[Path, typer.Argument(help="An exported folder, or any Hub folder of a vision model.")],
    data: Annotated[str, typer.Option(help="Shards to measure on.")],
    train_data: Annotated[str | None, typer.Option(help="Shards that kNN and the linear probes learn from.")] = None,
    measure: Annotated[
        list[str] | None, typer.Option(help="knn, linear, dense, zero_shot, retrieval. Default: all.")
    ] = None,
    pool: Annotated[str, typer.Option(help="mean, cls or both: the image vector of kNN and linear probe.")] = "mean",
    baseline: Annotated[str, typer.Option(help="pixels: also probe the raw pixels.")] = "none",
    exclude_group: Annotated[list[str] | None, typer.Option(help="Leave out samples of a group.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="A zero-shot prompt, {} for the class name; several are averaged.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images in one forward pass.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    as_json: Json = False,
) -> None:
    """What frozen features are worth: kNN, linear and dense probe, zero-shot, retrieval, with intervals by concept."""
    from m3i_scale.evaluate.commands import MEASURES
    from m3i_scale.evaluate.commands import evaluate as run_evaluation
    from m3i_scale.evaluate.report import render
    from m3i_scale.evaluate.zero_shot import TEMPLATES

    result = run_evaluation(
        model_dir,
        data,
        train_data=train_data,
        measures=tuple(measure or MEASURES),
        pool=cast(Any, pool),
        baseline=cast(Any, baseline),
        exclude_groups=tuple(exclude_group or ()),
        templates=tuple(template or TEMPLATES),
        batch_size=batch_size,
        device=device,
    )
    if as_json:
        print_json(result)
    else:
        Console().print(render(result))


@app.command(epilog="Example: m3i-scale export /data/runs/first --to /data/export --weights momentum")
def export(
    run: Annotated[Path, typer.Argument(help="A run's output_dir (its newest good checkpoint), or one checkpoint.")],
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    weights: Annotated[str, typer.Option(help="student or momentum.")] = "student",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
    license_id: Annotated[
        str, typer.Option("--license", help="Licence of the weights, as the Hub spells it, for the model card.")
    ] = "other",
    as_json: Json = False,
) -> None:
    """A Hugging Face folder that stock AutoModel loads, proven in a fresh process."""
    from m3i_scale.hub.export import export as run_export

    result = run_export(
        run, to, weights=cast(Any, weights), dtype=cast(Any, dtype), overwrite=overwrite, license_id=license_id
    )
    if as_json:
        print_json(result)
        return
    table = Table("", "")
    for key, value in result.items():
        if isinstance(value, str | int | float):
            table.add_row(key, str(value))
    Console().print(table)


app.add_typer(shards_app, name="shards")


def _without_local_rank(arguments: list[str]) -> list[str]:
    """The `deepspeed` launcher puts --local_rank=N first; LOCAL_RANK says the same."""
    return [item for item in arguments if not item.startswith("--local_rank=")]


def main() -> None:
    """Run the command line; a UserError becomes its message and its exit code."""
    sys.argv[1:] = _without_local_rank(sys.argv[1:])
    if "--json" in sys.argv:
        reserve_stdout()
    try:
        app()
    except UserError as error:
        rank = f"\\[rank {os.environ.get('RANK', '?')}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        _ERRORS.print(f"[bold red]{rank}error:[/] ", end="")
        _ERRORS.print(str(error), markup=False, highlight=False)
        sys.exit(error.exit_code)
