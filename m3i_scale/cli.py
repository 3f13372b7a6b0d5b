"""The door: one verb per command, no logic."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from m3i_scale.config import known_recipes, load_run, read_yaml
from m3i_scale.errors import EXIT_PREEMPTED, UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="M3I pre-training of vision backbones with DeepSpeed. Exit codes: 0 done, 2 a mistake that the message "
    "explains, 75 stopped by a signal after saving (start again to go on).",
)
_ERRORS = Console(stderr=True, soft_wrap=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


@app.command(epilog="Example: m3i-scale recipes --json")
def recipes(as_json: Json = False) -> None:
    """The paper's table, read from the built-in recipes: what predicts what, and how."""
    from m3i_scale.objective.recipe import describe, parse_recipe

    rows = [
        describe(parse_recipe(read_yaml(path)["recipe"], where=str(path)))
        for path in known_recipes().values()
    ]
    if as_json:
        _print_json(rows)
        return
    table = Table("recipe", "family", "input x", "target y", "f_φ", "f_ψ", "P̂", "regulariser", "w")
    for row in rows:
        for number, target in enumerate(row["targets"]):
            first = number == 0
            table.add_row(
                row["name"] if first else "",
                row["family"] if first else "",
                "\n".join(_input_text(x) for x in row["inputs"] if x["name"] in target["inputs"]),
                target["modality"] + (f", view {target['view']}" if target["view"] else ""),
                target["encoder"],
                target["decoder"],
                target["distribution"],
                target["regularizer"],
                f"{target['weight']:g}",
            )
        table.add_section()
    Console().print(table)


def _input_text(described: dict[str, Any]) -> str:
    mask = f", {described['mask']}" if described["mask"] else ""
    return f"view {described['view']}{mask}" + (", mixed" if described["mixed"] else "")


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
    from m3i_scale.run.start import start

    if start(config) == "preempted":
        raise typer.Exit(EXIT_PREEMPTED)


@app.command(epilog="Example: m3i-scale evaluate /data/export --data /data/shards/val --train-data /data/shards/train")
def evaluate(
    model_dir: Annotated[Path, typer.Argument(help="An exported folder.")],
    data: Annotated[str, typer.Option(help="Shards to measure on.")],
    train_data: Annotated[str | None, typer.Option(help="Shards that kNN and the linear probe learn from.")] = None,
    as_json: Json = False,
) -> None:
    """What frozen features are worth: kNN, linear probe, zero-shot, retrieval, with intervals."""
    raise NotImplementedError


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def _without_local_rank(arguments: list[str]) -> list[str]:
    """The `deepspeed` launcher puts --local_rank=N first; LOCAL_RANK says the same."""
    return [item for item in arguments if not item.startswith("--local_rank=")]


def main() -> None:
    """Run the command line; a UserError becomes its message and its exit code."""
    sys.argv[1:] = _without_local_rank(sys.argv[1:])
    try:
        app()
    except UserError as error:
        rank = f"\\[rank {os.environ['RANK']}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        _ERRORS.print(f"[bold red]{rank}error:[/] ", end="")
        _ERRORS.print(str(error), markup=False, highlight=False)
        sys.exit(error.exit_code)
