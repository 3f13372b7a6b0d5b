"""`m3i-scale checkpoint list | verify | inspect | diff | prune | consolidate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn

from m3i_scale.errors import EXIT_USER_ERROR
from m3i_scale.output import print_json, wide_console
from m3i_scale.run.checkpoints.consolidation import consolidate

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at checkpoints, compare them, remove some.")
checkpoint_app.command(epilog="Example: m3i-scale checkpoint consolidate /data/runs/first --to /data/whole")(
    consolidate
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]
Run = Annotated[Path, typer.Argument(help="A run's output_dir, or its checkpoints folder.")]
One = Annotated[Path, typer.Argument(help="One checkpoint; or a run, whose newest whole one is taken.")]


@checkpoint_app.command("list", epilog="Example: m3i-scale checkpoint list /data/runs/first")
def list_(
    run: Run,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte; otherwise sizes are compared.")] = False,
    as_json: AsJson = False,
) -> None:
    """All checkpoints of a run: step, age, size, whether good, figures, and why each stays."""
    from m3i_scale.report.checkpoint_tables import listing
    from m3i_scale.run.checkpoints.listing import list_checkpoints
    from m3i_scale.run.checkpoints.places import find_place

    document = list_checkpoints(find_place(run), contents=verify)
    _show(document, as_json, listing)


@checkpoint_app.command(epilog="Example: m3i-scale checkpoint verify /data/runs/first --json")
def verify(
    path: Annotated[Path, typer.Argument(help="One checkpoint; or a run, all of whose checkpoints are read.")],
    threads: Annotated[int, typer.Option(min=1, max=256, help="Files that are read at a time.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Compare every byte with the manifest. Exit code 2 where anything differs; the files at fault are named."""
    from m3i_scale.report.checkpoint_tables import verification
    from m3i_scale.run.checkpoints.verification import named_checkpoints, verify_checkpoints
    from m3i_scale.scale.checkpoint.pruning import folder_bytes

    found = named_checkpoints(path)
    with _bytes_bar(sum(map(folder_bytes, found)), quiet=as_json) as advance:
        document = verify_checkpoints(path, found, threads, advance)
    _show(document, as_json, verification)
    if not document["good"]:
        raise typer.Exit(EXIT_USER_ERROR)


@checkpoint_app.command(epilog="Example: m3i-scale checkpoint inspect /data/runs/first/checkpoints/step-00000100")
def inspect(path: One, as_json: AsJson = False) -> None:
    """What is in a checkpoint; reads headers and small files only."""
    from m3i_scale.report.checkpoint_tables import inspection
    from m3i_scale.run.checkpoints.inspection import inspect_checkpoint
    from m3i_scale.run.checkpoints.places import checkpoint_or_newest
    from m3i_scale.scale.checkpoint.reading import reading

    folder = checkpoint_or_newest(path)
    with reading(folder):
        document = inspect_checkpoint(folder)
    _show(document, as_json, inspection)


@checkpoint_app.command(epilog="Example: m3i-scale checkpoint diff /data/runs/first /data/runs/second --values")
def diff(
    a: One,
    b: One,
    values: Annotated[bool, typer.Option("--values", help="Compare the tensors' values as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """What differs between two checkpoints: settings field by field, position in the data, tensors."""
    from m3i_scale.report.checkpoint_tables import comparison
    from m3i_scale.run.checkpoints.comparison import diff_checkpoints
    from m3i_scale.run.checkpoints.places import checkpoint_or_newest
    from m3i_scale.scale.checkpoint.contents import tensors_of
    from m3i_scale.scale.checkpoint.reading import reading

    one, other = checkpoint_or_newest(a), checkpoint_or_newest(b)
    with ExitStack() as stack:
        for folder in (one, other):
            stack.enter_context(reading(folder))
        total = sum(stored.bytes for stored in tensors_of(one).values())
        advance = stack.enter_context(_bytes_bar(total, quiet=as_json or not values))
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
    """Remove what no rule keeps; without options, by the rules of the run file. The last good one always stays."""
    from m3i_scale.report.checkpoint_tables import pruning
    from m3i_scale.run.checkpoints.places import find_place
    from m3i_scale.run.checkpoints.removal import prune_run, rules_given

    place = find_place(run)
    rules, given_by = rules_given(place, keep_latest, keep_every, keep_best, max_gib)
    _show(prune_run(place, rules, dry_run=dry_run) | {"rules_from": given_by}, as_json, pruning)


def _show(document: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], Any]) -> None:
    if as_json:
        print_json(document)
    else:
        wide_console().print(table(document))


@contextmanager
def _bytes_bar(total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar over bytes on standard error; none where standard output is a JSON document."""
    if quiet:
        yield lambda size: None
        return
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("read", total=total)
        yield lambda size: bar.advance(task, size)
