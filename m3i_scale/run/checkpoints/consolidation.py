"""`m3i-scale checkpoint consolidate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from m3i_scale.output import print_json, wide_console

_LISTED = 12
"""Files that the table names."""


def consolidate(
    path: Annotated[Path, typer.Argument(help="One checkpoint; or a run, whose newest good one is taken.")],
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    weights: Annotated[str, typer.Option(help="student or momentum.")] = "student",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    max_shard_size: Annotated[
        str | None, typer.Option(help="Of a file: 5GB, 500MB; KB, MB, GB, TB as the Hub counts. Default: 5GB.")
    ] = None,
    layout: Annotated[
        str, typer.Option(help="safetensors; or what DeepSpeed reads: universal, deepspeed (zero_to_fp32).")
    ] = "safetensors",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
) -> None:
    """Whole tensors from the pieces of all ranks, streamed: memory does not grow with the model."""
    from m3i_scale.scale.checkpoint.merge import consolidate as write

    result = write(
        path,
        to,
        weights=cast(Any, weights),
        dtype=cast(Any, dtype),
        max_shard_size=max_shard_size,
        layout=cast(Any, layout),
    )
    if as_json:
        print_json(result)
        return
    table = Table("", "")
    for key, value in result.items():
        if key != "files":
            table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    for file, size in list(result["files"].items())[:_LISTED]:
        table.add_row(file, f"{size:,} bytes")
    if (more := len(result["files"]) - _LISTED) > 0:
        table.add_row(f"… and {more:,} more files", "")
    wide_console().print(table)
