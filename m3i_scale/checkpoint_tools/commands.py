"""Command line of `m3i-scale checkpoint list | verify | inspect | prune | consolidate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console, Group, RenderableType
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from m3i_scale.errors import EXIT_USER_ERROR
from m3i_scale.options import AsJson, choices, writes_to
from m3i_scale.output import print_result
from m3i_scale.text import duration_text, size_text

_SHOWN_FILES = 12

checkpoint_app = typer.Typer(no_args_is_help=True, help="List, verify, inspect, prune and consolidate checkpoints.")
Run = Annotated[Path, typer.Argument(help="Output directory of a run, or its checkpoints folder.")]
One = Annotated[Path, typer.Argument(help="Checkpoint, or a run for its newest valid one.")]


@checkpoint_app.command("list", epilog="Example: m3i-scale checkpoint list /data/runs/first")
def list_(run: Run, as_json: AsJson = False) -> None:
    """List the checkpoints of a run with size, age, metrics, and why each is kept."""
    from m3i_scale.checkpoint.retention import evaluations
    from m3i_scale.checkpoint_tools.documents import list_checkpoints
    from m3i_scale.checkpoint_tools.paths import root_of

    root = root_of(run)
    document = list_checkpoints(root, evaluations(root.absolute().parent))
    print_result(as_json, document, lambda: _list_table(document))


@checkpoint_app.command(epilog="Example: m3i-scale checkpoint verify /data/runs/first --json")
def verify(
    path: Annotated[Path, typer.Argument(help="Checkpoint, or a run for all its checkpoints.")],
    as_json: AsJson = False,
) -> None:
    """Verify the checksum of every file. Exit with code 2 if a file is corrupt or missing."""
    from m3i_scale.checkpoint_tools.documents import verify_checkpoints
    from m3i_scale.checkpoint_tools.paths import named_checkpoints
    from m3i_scale.files import folder_bytes

    with _bytes_bar(sum(map(folder_bytes, named_checkpoints(path))), quiet=as_json) as advance:
        document = verify_checkpoints(path, advance)
    print_result(as_json, document, lambda: _verify_lines(document))
    if not document["good"]:
        raise typer.Exit(EXIT_USER_ERROR)


@checkpoint_app.command(epilog="Example: m3i-scale checkpoint inspect /data/runs/first/checkpoints/step-00000100")
def inspect(path: One, as_json: AsJson = False) -> None:
    """Show the contents of a checkpoint: step, model, data position and sizes. Weights are not read."""
    from m3i_scale.checkpoint_tools.documents import inspect_checkpoint
    from m3i_scale.checkpoint_tools.paths import checkpoint_or_newest

    document = inspect_checkpoint(checkpoint_or_newest(path))
    print_result(as_json, document, lambda: _inspect_table(document))


@checkpoint_app.command(
    epilog="Example: m3i-scale checkpoint prune /data/runs/first --keep-best evaluation/loss:min:3 --dry-run"
)
def prune(
    run: Run,
    keep_latest: Annotated[int | None, typer.Option(min=1, help="Keep the newest N.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Keep steps that are multiples of N.")] = None,
    keep_best: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="Keep the best by METRIC[:min|max][:count], e.g. evaluation/loss:min:3."),
    ] = None,
    max_gib: Annotated[float | None, typer.Option(min=0.0, help="Maximum total size in GiB.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete checkpoints that no retention rule keeps. Default: the rules of the config.

    The latest valid checkpoint is always kept.
    """
    from m3i_scale.checkpoint_tools.documents import prune_run, rules_given
    from m3i_scale.checkpoint_tools.paths import root_of

    root = root_of(run)
    rules, given_by = rules_given(root, keep_latest, keep_every, keep_best, max_gib)
    document = prune_run(root, rules, dry_run=dry_run) | {"rules_from": given_by}
    print_result(as_json, document, lambda: _prune_table(document))


@checkpoint_app.command(epilog="Example: m3i-scale checkpoint consolidate /data/runs/first --output /data/whole")
def consolidate(
    path: Annotated[Path, typer.Argument(help="Checkpoint, or a run for its newest valid one.")],
    output: Annotated[Path, typer.Option(callback=writes_to, help="New folder for the weights.")],
    weights: Annotated[
        str, typer.Option(**choices("student", "ema"), help="Trained weights, or their EMA.")
    ] = "student",
    dtype: Annotated[str, typer.Option(**choices("float32", "bfloat16"), help="Data type.")] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weight file, e.g. 500MB.")] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Merge the shards of all ranks into full safetensors weights. Memory use does not grow with the model."""
    from m3i_scale.checkpoint_tools.consolidate import consolidate as write

    document = write(
        path,
        output,
        weights=cast(Any, weights),
        dtype=cast(Any, dtype),
        max_shard_size=max_shard_size,
    )
    print_result(as_json, document, lambda: _consolidate_table(document))


@contextmanager
def _bytes_bar(total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over bytes on stderr, unless `quiet`."""
    if quiet:
        yield lambda size: None
        return
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("read", total=total)
        yield lambda size: bar.advance(task, size)


# ------------------------------------------------------------------ tables


def _list_table(document: Mapping[str, Any]) -> RenderableType:
    table = _table("checkpoint", "samples", "age", "size", "good by sizes", "metrics", "kept by")
    for row in document["checkpoints"]:
        name = Text(row["name"] + ("  ← latest" if row["latest"] else ""))
        metrics = (
            f"{key.removeprefix('evaluation/')} {float(row['metrics'][key]):.5g}"
            for key in _main_metrics(document, row)
        )
        kept = Text(
            "\n".join(row["kept_by"]) or ("" if document["rules"] is None else "nothing: removed at the next save")
        )
        samples = "?" if row["samples"] is None else f"{row['samples']:,}"
        mark = Text("yes", "green") if row["good"] else Text("no", "bold red")
        age = "?" if row["age_s"] is None else duration_text(row["age_s"])
        table.add_row(name, samples, age, size_text(row["bytes"]), mark, Text("\n".join(metrics)), kept)
    notes = [Text(f"{document['root']}: {len(document['checkpoints'])} checkpoints, {size_text(document['bytes'])}")]
    if document["rules"] is None:
        notes.append(Text("no config file next to them, so no rules are known", "yellow"))
    for left in document["temporary"]:
        text = f"{left['name']} ({size_text(left['bytes'])}): being written or removed, or left by a killed job"
        notes.append(Text(text, "yellow"))
    return Group(table, *notes)


def _main_metrics(document: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """Return the loss and the metric that selects the best checkpoint."""
    best = (document["rules"] or {}).get("keep_best") or {}
    wanted = {"evaluation/loss", best.get("metric")}
    return [name for name in row["metrics"] if name in wanted]


def _verify_lines(document: Mapping[str, Any]) -> RenderableType:
    lines = []
    for row in document["checkpoints"]:
        if row["good"]:
            lines.append(Text(f"{row['checkpoint']}: good", "green"))
        for error in row["errors"]:
            lines.append(Text(f"{row['checkpoint']}/{error['file']}: {error['what']}", "bold red"))
    return Group(*lines)


def _inspect_table(document: Mapping[str, Any]) -> RenderableType:
    facts = Table("", "", box=None, show_header=False)
    shown = ("name", "step", "samples", "recipe", "backbone", "world_size", "zero_stage", "precision", "vocab_size")
    for key in shown:
        if document[key] is not None:
            value = document[key]
            facts.add_row(key.replace("_", " "), Text(f"{value:,}" if isinstance(value, int) else str(value)))
    facts.add_row("size", size_text(document["bytes"]))
    facts.add_row("data", Text("\n".join(_position_text(name, at) for name, at in document["data"].items())))
    versions = document["versions"] or {}
    facts.add_row("versions", Text(", ".join(f"{name} {number}" for name, number in versions.items()) or "not known"))
    for error in document["errors_by_size"]:
        facts.add_row(Text("error", "bold red"), Text(error))
    table = _table("kind", "tensors", "size", "types")
    for kind, row in document["tensors"].items():
        table.add_row(kind, f"{row['tensors']:,}", size_text(row["bytes"]), " ".join(row["dtypes"]))
    return Group(Text(document["checkpoint"], "bold"), facts, table)


def _position_text(name: str, at: Mapping[str, Any]) -> str:
    passes = "" if at["passes"] is None else f", {at['passes']:.2f} passes"
    bad = f", {at['bad']:,} of them bad" if at["bad"] else ""
    return f"{name}: {at['read']:,} samples read{bad}; it has {at['samples']:,} in {at['shards']:,} shards{passes}"


def _prune_table(document: Mapping[str, Any]) -> RenderableType:
    table = _table("checkpoint", "", "why")
    for name, reasons in document["kept"].items():
        table.add_row(name, Text("kept", "green"), Text("\n".join(reasons)))
    for name in document["removed"]:
        table.add_row(name, Text("would be removed" if document["dry_run"] else "removed", "red"), "no rule keeps it")
    word = "would be freed" if document["dry_run"] else "freed"
    rules = Text(f"rules, from {document['rules_from']}: {_rules(document['rules'])}")
    return Group(rules, table, Text(f"{document['root']}: {size_text(document['bytes_removed'])} {word}"))


def _consolidate_table(document: Mapping[str, Any]) -> RenderableType:
    table = Table("", "", box=None, show_header=False, pad_edge=False)
    table.add_row("checkpoint", f"{document['checkpoint']}, step {document['step']}")
    table.add_row("weights", f"{document['weights']}, {document['dtype']}")
    if document["not_averaged"]:
        table.add_row("without EMA", f"{', '.join(document['not_averaged'])}: trained weights")
    table.add_row("parameters", f"{document['parameters']:,} in {document['tensors']:,} tensors")
    for file, count in list(document["files"].items())[:_SHOWN_FILES]:
        table.add_row(file, size_text(count))
    if (more := len(document["files"]) - _SHOWN_FILES) > 0:
        table.add_row(f"… and {more:,} more files", "")
    return Group(table, Text(f"\nwritten to {document['output']}: {size_text(document['bytes'])}", "bold"))


def _rules(rules: Mapping[str, Any]) -> str:
    best = rules["keep_best"]
    values = {**rules, "keep_best": None if best is None else f"{best['metric']}:{best['mode']}:{best['count']}"}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, header_style="bold")
    table.columns[0].no_wrap = True
    return table
