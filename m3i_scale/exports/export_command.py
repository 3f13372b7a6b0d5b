"""`m3i-scale export`: the command. Slow imports happen inside the function."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from m3i_scale.options import AsJson, Imports, choices, writes_to
from m3i_scale.output import leave_out_accelerator_warning, print_json, wide_console
from m3i_scale.text import size_text


def export(
    run: Annotated[
        Path, typer.Argument(help="Output directory of a run (its newest valid checkpoint), or a checkpoint.")
    ],
    output: Annotated[Path, typer.Option(callback=writes_to, help="New or empty folder for the export.")],
    weights: Annotated[
        str, typer.Option(**choices("student", "ema"), help="Trained weights, or their EMA.")
    ] = "student",
    dtype: Annotated[str, typer.Option(**choices("float32", "bfloat16"), help="Data type of the weights.")] = "float32",
    task: Annotated[
        str,
        typer.Option(
            **choices("features", "classification", "segmentation", "detection", "zero_shot", "backbone"),
            help="Model to export: the feature extractor, or a model with a trained head.",
        ),
    ] = "features",
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            **choices("transformers", "timm", "onnx"),
            help="File format. onnx: transformers, and a file for ONNX Runtime.",
        ),
    ] = "transformers",
    label_set: Annotated[str | None, typer.Option(help="Label set of the classifier, if there are several.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weight file, e.g. 500MB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    license_id: Annotated[
        str, typer.Option("--license", help="License of the weights for the model card, as a Hub id.")
    ] = "other",
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Output of `evaluate --output` for the model card. Default: evaluation.json of the run."),
    ] = None,
    blend: Annotated[
        Path | None,
        typer.Option(help="Model of the same shape to interpolate with (WiSE-FT), e.g. the start of the run."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="With --blend: share of the trained weights, from 0 to 1. Default: 0.5.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload to this private repository of the Hub.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: make the repository public.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push: upload nothing, only list files and sizes.")
    ] = False,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Export a trained model to a Hugging Face folder. It loads without this package.

    The export is loaded in a new process, and its outputs are compared with those of the checkpoint.
    """
    leave_out_accelerator_warning()
    from m3i_scale.config.sections import import_given
    from m3i_scale.errors import ExportError
    from m3i_scale.exports.blend import Blend
    from m3i_scale.exports.export import export_and_push
    from m3i_scale.exports.push import push_summary
    from m3i_scale.exports.write import ExportContents

    import_given(imports)
    if alpha is not None and blend is None:
        raise ExportError("--alpha has no effect without --blend", fix="add --blend FOLDER, or leave it out")
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
        blended=None if blend is None else Blend(blend, 0.5 if alpha is None else alpha),
    )
    if as_json:
        print_json(result)
        return
    wide_console().print(_export_table(result, push_summary(result["push"]) if push is not None else []))


def _export_table(facts: dict[str, Any], pushed: list[tuple[str, str]]) -> Group:
    """Return what was exported, and the commands that use it."""
    folder = facts["output"]
    table = Table("", "", box=None, show_header=False, pad_edge=False)
    rows = {
        "model": f"{facts['task']} of run {facts['name']}, {facts['parameters'] / 1e6:,.1f}M parameters",
        "weights": f"{facts['weights']}, {facts['dtype']}, {facts['format']} format",
        "trained": f"{facts['step']:,} steps, {facts['samples']:,} samples ({facts['checkpoint']})",
        "blend": facts["blend"] and f"{facts['blend']['alpha']:g} trained, the rest {facts['blend']['model']}",
        "label set": facts["label_set"],
        "license": facts["license"],
        "verified": f"loads as {', '.join(facts['verified']['classes'].values())}, with the outputs of the checkpoint",
        "size": f"{size_text(facts['bytes'])} in {len(facts['files'])} files",
        "warning": facts["warning"],
    }
    for name, text in (*rows.items(), *pushed):
        if text is not None:
            table.add_row(Text(name), Text(str(text), "yellow" if name == "warning" else ""))
    trains = " --train-data SHARDS/train" if facts["task"] == "features" else ""
    use = f"evaluate: m3i-scale evaluate {shlex.quote(folder)} --data SHARDS/val{trains}"
    if facts["task"] == "zero_shot":
        use = f'classify: transformers.pipeline("zero-shot-image-classification", {folder!r})'
    return Group(
        table,
        Text(f"\nexported to {folder}", "bold"),
        Text(f"load with transformers: see 'How to load' in {folder}/README.md"),
        Text(use),
    )
