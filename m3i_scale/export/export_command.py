"""`m3i-scale export`: the command. Slow imports happen inside the function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from m3i_scale.options import AsJson, Imports, writes_to
from m3i_scale.output import leave_out_accelerator_warning, print_json, wide_console


def export(
    run: Annotated[Path, typer.Argument(help="A run's output_dir (its newest good checkpoint), or one checkpoint.")],
    output: Annotated[Path, typer.Option(callback=writes_to, help="Folder to write: new or empty.")],
    weights: Annotated[str, typer.Option(help="student or ema.")] = "student",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    task: Annotated[
        str, typer.Option(help="features, classification, segmentation, detection, zero_shot or backbone.")
    ] = "features",
    file_format: Annotated[
        str, typer.Option("--format", help="transformers, timm, or onnx: a file for ONNX Runtime, too.")
    ] = "transformers",
    label_set: Annotated[str | None, typer.Option(help="Label set of the exported classifier.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
    license_id: Annotated[
        str, typer.Option("--license", help="License of the weights, as the Hub spells it, for the model card.")
    ] = "other",
    evaluation: Annotated[
        Path | None, typer.Option(help="What `evaluate --json` printed. Default: evaluation.json of the run.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Publish as this repository of the Hub, private.")] = None,
    public: Annotated[bool, typer.Option(help="Publish for everyone.")] = False,
    dry_run: Annotated[bool, typer.Option(help="With --push: only list files and sizes.")] = False,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Write a Hugging Face folder for standard classes, verified in a fresh process."""
    leave_out_accelerator_warning()
    from m3i_scale.config.sections import import_given
    from m3i_scale.export.export import export_and_push
    from m3i_scale.export.push import push_summary
    from m3i_scale.export.write import ExportContents

    import_given(imports)
    result = export_and_push(
        run,
        output,
        push_to=push,
        public=public,
        dry_run=dry_run,
        weights=cast(Any, weights),
        dtype=cast(Any, dtype),
        wanted=ExportContents(cast(Any, task), cast(Any, file_format), label_set, max_shard_size),
        overwrite=overwrite,
        license_id=license_id,
        evaluation_file=evaluation,
    )
    if as_json:
        print_json(result)
        return
    table = Table("", "")
    for key, value in result.items():
        if isinstance(value, str | int | float):
            table.add_row(key, str(value))
    for row in push_summary(result["push"]) if push is not None else ():
        table.add_row(*row)
    wide_console().print(table)
