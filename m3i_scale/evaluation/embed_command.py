"""`m3i-scale embed`. Slow imports happen inside the function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Group
from rich.text import Text

from m3i_scale.evaluation.command_line import BatchSize, Dtype, Workers
from m3i_scale.options import AsJson, choices, reading_bar, writes_to
from m3i_scale.output import leave_out_accelerator_warning, print_result

_READ_WITH = {".parquet": "pyarrow.parquet.read_table({!r})", ".npz": "numpy.load({!r})"}
_SHOWN = 5


def embed(
    model: Annotated[str, typer.Argument(help="An exported folder, any folder of a vision model, or a Hub id.")],
    data: Annotated[str, typer.Option(help="A folder of images, searched recursively, or shards.")],
    output: Annotated[
        Path, typer.Option(callback=writes_to, help="File to write or replace: features.parquet or .npz.")
    ],
    pool: Annotated[
        str, typer.Option(**choices("mean", "cls", "both"), help="Patch tokens, class token, or both.")
    ] = "mean",
    batch_size: BatchSize = None,
    num_workers: Workers = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Write the features of every image to a file, one row per image. Use all visible GPUs. Skip unreadable images."""
    leave_out_accelerator_warning()
    from m3i_scale.evaluation.embed import embed as run_embedding

    with reading_bar() as progress:
        result = run_embedding(
            model,
            data,
            output,
            pool=cast(Any, pool),
            batch_size=batch_size,
            num_workers=num_workers,
            dtype=cast(Any, dtype),
            progress=progress,
        )
    print_result(as_json, result, lambda: Group(*map(Text, summary_lines(result))))


def summary_lines(result: dict[str, Any]) -> list[str]:
    """Return what `embed` has written and skipped, and how to read it."""
    output = Path(result["output"])
    lines = [
        f"{output}: {result['images']:,} images × {result['feature_width']} features"
        f" (pool {result['pool']}, {result['image_size']} × {result['image_size']} pixels, {result['dtype']})"
    ]
    skipped = result["skipped"]
    if skipped["count"]:
        lines.append(f"skipped images: {skipped['count']:,}")
        lines += [f"  {one['key']}: {one['reason']}" for one in skipped["samples"][:_SHOWN]]
        if skipped["count"] > _SHOWN:
            lines.append("  … (--json lists more)")
    return [*lines, "read it: " + _READ_WITH[output.suffix].format(str(output))]
