"""`m3i-scale shards split | merge`: rearrange shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from m3i_scale.data.cut import Cut
from m3i_scale.data.option_sets import takes_cut
from m3i_scale.data.options import AsJson, Name, Output, Shards, choice, made_lines, print_summary
from m3i_scale.data.tools.commands import progress_bar


@takes_cut
def split(
    shards: Shards,
    output: Output,
    cut: Cut,
    name: Name = "images",
    shares: Annotated[
        str | None, typer.Option(help="Of samples by split, drawn by a hash of the key: train=0.95,val=0.05")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Field of the json members; samples with the same value stay together.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Deal samples into splits, or only cut shards anew. Contents of members stay as they are."""
    from m3i_scale.data.make import parse_splits
    from m3i_scale.data.tools.split import split_shards

    with progress_bar([shards], quiet=as_json, times=2) as advance:
        summary = split_shards(
            shards,
            output,
            cut=cut,
            name=name,
            shares=None if shares is None else parse_splits(shares),
            group=group,
            advance=advance,
        )
    print_summary(summary, as_json, _text(summary, output))


@takes_cut
def merge(
    sources: Annotated[list[str], typer.Argument(help="Folders, brace patterns or single tars.")],
    output: Output,
    cut: Cut,
    name: Name = "images",
    keys: Annotated[
        str, typer.Option(help="refuse keys that repeat, or prefix all with number of source and name of shard")
    ] = "refuse",
    as_json: AsJson = False,
) -> None:
    """Put the samples of several sources into one folder; label sets are joined by the names of the classes."""
    from m3i_scale.data.tools.split import Keys, merge_shards

    with progress_bar(sources, quiet=as_json, times=2) as advance:
        summary = merge_shards(sources, output, cut=cut, name=name, keys=choice("--keys", keys, Keys), advance=advance)
    print_summary(summary, as_json, _text(summary, output))


def _text(summary: dict[str, Any], output: Path) -> str:
    splits = summary.get("splits", {"": summary})
    lines = made_lines({"splits": splits}, output)
    if summary["tokenizer"] is None:
        lines.append("no tokenizer: the sources have none, or different ones; recipes with text need text.tokenizer")
    return "\n".join(lines)
