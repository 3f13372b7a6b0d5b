"""Command line of `m3i-scale checkpoint list | verify | inspect | diff | prune | consolidate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn

from m3i_scale.errors import EXIT_USER_ERROR
from m3i_scale.options import AsJson, writes_to
from m3i_scale.output import print_json, wide_console

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at checkpoints, compare them, remove some.")
Run = Annotated[Path, typer.Argument(help="A run's output_dir, or its checkpoints folder.")]
One = Annotated[Path, typer.Argument(help="One checkpoint; or a run, whose newest whole one is taken.")]


@checkpoint_app.command("list", epilog="Example: m3i-scale checkpoint list /data/runs/first")
def list_(
    run: Run,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte; otherwise sizes are compared.")] = False,
    as_json: AsJson = False,
) -> None:
    """List all checkpoints of a run: step, age, size, validity, metrics, and why each is kept."""
    from m3i_scale.checkpoint.documents import root_of
    from m3i_scale.checkpoint.listing import list_checkpoints
    from m3i_scale.checkpoint.retention_checks import evaluations
    from m3i_scale.checkpoint.tables import listing

    root = root_of(run)
    _show(list_checkpoints(root, evaluations(root.absolute().parent), contents=verify), as_json, listing)


@checkpoint_app.command(epilog="Example: m3i-scale checkpoint verify /data/runs/first --json")
def verify(
    path: Annotated[Path, typer.Argument(help="One checkpoint; or a run, all of whose checkpoints are read.")],
    threads: Annotated[int, typer.Option(min=1, max=256, help="Files that are read at a time.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Compare every byte with the manifest. Exits with 2 if there are differences, and names the corrupt files."""
    from m3i_scale.checkpoint.documents import named_checkpoints, verify_checkpoints
    from m3i_scale.checkpoint.tables import verification
    from m3i_scale.files import folder_bytes

    with _bytes_bar(sum(map(folder_bytes, named_checkpoints(path))), quiet=as_json) as advance:
        document = verify_checkpoints(path, threads, advance)
    _show(document, as_json, verification)
    if not document["good"]:
        raise typer.Exit(EXIT_USER_ERROR)


@checkpoint_app.command(epilog="Example: m3i-scale checkpoint inspect /data/runs/first/checkpoints/step-00000100")
def inspect(path: One, as_json: AsJson = False) -> None:
    """Show the contents of a checkpoint; reads headers and small files only."""
    from m3i_scale.checkpoint.documents import checkpoint_or_newest, inspect_checkpoint
    from m3i_scale.checkpoint.tables import inspection

    _show(inspect_checkpoint(checkpoint_or_newest(path)), as_json, inspection)


@checkpoint_app.command(epilog="Example: m3i-scale checkpoint diff /data/runs/first /data/runs/second --values")
def diff(
    a: One,
    b: One,
    values: Annotated[bool, typer.Option("--values", help="Compare the tensors' values as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the differences between two checkpoints: settings by field, data position, tensors."""
    from m3i_scale.checkpoint.contents import tensors_of
    from m3i_scale.checkpoint.documents import checkpoint_or_newest, diff_checkpoints
    from m3i_scale.checkpoint.tables import comparison

    one, other = checkpoint_or_newest(a), checkpoint_or_newest(b)
    total = sum(stored.bytes for stored in tensors_of(one).values())
    with _bytes_bar(total, quiet=as_json or not values) as advance:
        document = diff_checkpoints(one, other, values=values, advance=advance)
    _show(document, as_json, comparison)


@checkpoint_app.command(
    epilog="Example: m3i-scale checkpoint prune /data/runs/first --keep-best evaluation/loss:min:3 --dry-run"
)
def prune(
    run: Run,
    keep_latest: Annotated[int | None, typer.Option(min=1, help="The newest so many stay.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Steps that are multiples of this stay.")] = None,
    keep_best: Annotated[str | None, typer.Option(help="FIGURE[:min|max][:count], e.g. evaluation/loss:min:3")] = None,
    max_gib: Annotated[float | None, typer.Option(min=0.0, help="All together take no more than this.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete checkpoints that no rule keeps. Default: the rules of the config. The latest valid one is always kept."""
    from m3i_scale.checkpoint.documents import root_of
    from m3i_scale.checkpoint.pruning import prune_run, rules_given
    from m3i_scale.checkpoint.tables import pruning

    root = root_of(run)
    rules, given_by = rules_given(root, keep_latest, keep_every, keep_best, max_gib)
    _show(prune_run(root, rules, dry_run=dry_run) | {"rules_from": given_by}, as_json, pruning)


@checkpoint_app.command(epilog="Example: m3i-scale checkpoint consolidate /data/runs/first --output /data/whole")
def consolidate(
    path: Annotated[Path, typer.Argument(help="One checkpoint; or a run, whose newest good one is taken.")],
    output: Annotated[Path, typer.Option(callback=writes_to, help="Folder to write; must not exist.")],
    weights: Annotated[str, typer.Option(help="student or ema.")] = "student",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    max_shard_size: Annotated[
        str | None, typer.Option(help="Of a file: 5GB, 500MB; KB, MB, GB, TB as the Hub counts. Default: 5GB.")
    ] = None,
    layout: Annotated[
        str, typer.Option(help="safetensors; or what DeepSpeed reads: universal, deepspeed (zero_to_fp32).")
    ] = "safetensors",
    as_json: AsJson = False,
) -> None:
    """Merge the shards of all ranks into full tensors. Streams data, so memory does not grow with the model."""
    from m3i_scale.checkpoint.consolidate import consolidate as write
    from m3i_scale.checkpoint.tables import consolidation

    document = write(
        path,
        output,
        weights=cast(Any, weights),
        dtype=cast(Any, dtype),
        max_shard_size=max_shard_size,
        layout=cast(Any, layout),
    )
    _show(document, as_json, consolidation)


def _show(document: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], Any]) -> None:
    if as_json:
        print_json(document)
    else:
        wide_console().print(table(document))


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
