"""Options that the commands of `m3i-scale shards` share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from m3i_scale.data.cut import ShardOptions
from m3i_scale.errors import ConfigError
from m3i_scale.output import print_json

if TYPE_CHECKING:  # importing it takes seconds, which --help has not
    from m3i_scale.data.make import Progress as Tell

Shards = Annotated[str, typer.Argument(help="A folder, a brace pattern or one tar.")]
Output = Annotated[Path, typer.Option(help="Folder to make; it must not exist yet.")]
Name = Annotated[str, typer.Option(help="Beginning of the shards' file names.")]
Split = Annotated[str | None, typer.Option(help="Shares of samples by split, drawn by hash: train=0.95,val=0.05")]
PerShard = Annotated[int, typer.Option(help="At most so many samples a shard.")]
MaxMb = Annotated[float, typer.Option(help="About so many megabytes a shard at most.")]
MultipleOf = Annotated[int, typer.Option(help="Round the number of shards up to a multiple of this.")]
Vocabulary = Annotated[int, typer.Option(help="Size of the tokenizer trained on the captions; 0 trains none.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out and count what cannot be used.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that read shards, or read and encode images.")]
LabelsFile = Annotated[
    Path | None,
    typer.Option("--labels", help="Class names: a JSON list, or one a line; default: as found in the input."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]

DEFAULTS = ShardOptions()


def made_lines(summary: dict[str, Any], output: Path) -> list[str]:
    """What `make` tells of every split."""
    lines = [
        f"{output / which}: {facts['samples']} samples ({facts['with_label']} with label, {facts['with_caption']} with "
        f"caption, {facts['with_mask']} with mask) in {facts['shards']} shards"
        for which, facts in summary["splits"].items()
    ]
    return lines + [f"left out: {count} × {reason}" for reason, count in summary.get("skipped", {}).items()]


@contextmanager
def sample_bar(quiet: bool) -> Iterator[Tell | None]:
    """A bar over samples; none where standard output is a JSON document."""
    if quiet:
        yield None
        return
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("samples", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_summary(summary: dict[str, Any], as_json: bool, text: str) -> None:
    """One JSON document, or text."""
    if as_json:
        print_json(summary)
    else:
        sys.stdout.write(text + "\n")


def choice(option: str, value: str, kind: Any) -> Any:
    """A value out of a `Literal`.

    Raises:
        ConfigError: another one.
    """
    if value not in get_args(kind):
        raise ConfigError(f"{option} {value}", fix=f"one of {', '.join(get_args(kind))}")
    return value
