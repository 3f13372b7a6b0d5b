"""`m3i-scale shards`: make and index shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from m3i_scale.data.emoji import GROUPS, Background, emoji_records
from m3i_scale.data.index import build_index
from m3i_scale.data.make import Progress as Tell
from m3i_scale.data.make import ShardOptions, make_shards, parse_splits
from m3i_scale.data.records import Record
from m3i_scale.data.shards import expand_shards
from m3i_scale.data.sources import Captions, Columns, imagefolder_records, manifest_records, read_labels
from m3i_scale.errors import ConfigError
from m3i_scale.output import print_json

EMOJI_SAMPLES_PER_SHARD = 160

shards_app = typer.Typer(no_args_is_help=True, help="Make WebDataset shards, and index those you have.")
make_app = typer.Typer(no_args_is_help=True, help="Make shards out of images.")
shards_app.add_typer(make_app, name="make")

Output = Annotated[Path, typer.Option(help="Folder to make; it must not exist yet.")]
Name = Annotated[str, typer.Option(help="Beginning of the shards' file names.")]
Split = Annotated[str | None, typer.Option(help="Shares of samples by split, drawn by hash: train=0.95,val=0.05")]
PerShard = Annotated[int, typer.Option(help="At most so many samples a shard.")]
MaxMb = Annotated[float, typer.Option(help="About so many megabytes a shard at most.")]
MultipleOf = Annotated[int, typer.Option(help="Round the number of shards up to a multiple of this.")]
Vocabulary = Annotated[int, typer.Option(help="Size of the tokenizer trained on the captions; 0 trains none.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out and count what cannot be used.")]
Workers = Annotated[int, typer.Option(help="Processes that read and encode images.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)
DEFAULTS = ShardOptions()


@make_app.command(
    "imagefolder", epilog="Example: m3i-scale shards make imagefolder --input /data/birds --output /data/b"
)
def make_imagefolder(
    input_folder: Annotated[Path, typer.Option("--input", help="One folder per class, images below.")],
    output: Output,
    name: Name = "images",
    captions: Annotated[
        str, typer.Option(help="NAME.txt beside an image: auto (all have one or none has), none, optional, required")
    ] = "auto",
    split: Split = None,
    samples_per_shard: PerShard = DEFAULTS.samples_per_shard,
    max_mb: MaxMb = DEFAULTS.max_mb,
    multiple_of: MultipleOf = DEFAULTS.multiple_of,
    vocabulary: Vocabulary = DEFAULTS.vocabulary,
    skip_bad: SkipBad = False,
    workers: Workers = DEFAULT_WORKERS,
    as_json: AsJson = False,
) -> None:
    """A folder of images, one folder per class, captions beside."""
    records, labels = imagefolder_records(input_folder, _choice("--captions", captions, Captions))
    options = ShardOptions(samples_per_shard, max_mb, multiple_of, vocabulary, skip_bad, workers)
    _make(records, labels, output, name, split, options, {"source": "imagefolder"}, as_json)


@make_app.command(
    "manifest", epilog="Example: m3i-scale shards make manifest --input /data/photos.csv --output /data/p"
)
def make_manifest(
    manifest: Annotated[Path, typer.Option("--input", help="A .csv, .tsv, .parquet or .jsonl file.")],
    output: Output,
    name: Name = "images",
    root: Annotated[
        Path | None, typer.Option(help="Relative paths start here; default: the manifest's folder.")
    ] = None,
    path_column: Annotated[str, typer.Option(help="Column of image paths.")] = "path",
    caption_column: Annotated[str, typer.Option(help="Column of captions.")] = "caption",
    label_column: Annotated[str, typer.Option(help="Column of labels, names or numbers.")] = "label",
    split_column: Annotated[str, typer.Option(help="Column of splits.")] = "split",
    mask_column: Annotated[
        str | None, typer.Option(help="Column of paths of masks: PNGs, the class of every pixel.")
    ] = None,
    labels_file: Annotated[
        Path | None, typer.Option("--labels", help="Class names: a JSON list, or one a line.")
    ] = None,
    split: Split = None,
    samples_per_shard: PerShard = DEFAULTS.samples_per_shard,
    max_mb: MaxMb = DEFAULTS.max_mb,
    multiple_of: MultipleOf = DEFAULTS.multiple_of,
    vocabulary: Vocabulary = DEFAULTS.vocabulary,
    skip_bad: SkipBad = False,
    workers: Workers = DEFAULT_WORKERS,
    as_json: AsJson = False,
) -> None:
    """A table of image paths, captions and labels."""
    records, labels = manifest_records(
        manifest,
        columns=Columns(path_column, caption_column, label_column, split_column, mask_column),
        root=root,
        labels=None if labels_file is None else read_labels(labels_file),
    )
    options = ShardOptions(samples_per_shard, max_mb, multiple_of, vocabulary, skip_bad, workers)
    _make(records, labels, output, name, split, options, {"source": "manifest"}, as_json)


@make_app.command("emoji", epilog="Example: m3i-scale shards make emoji --output /data/emoji")
def make_emoji(
    output: Output,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Side of the pictures in pixels.")] = 128,
    background: Annotated[str, typer.Option(help="white, or plain: one light colour per picture")] = "white",
    noto_font: Annotated[Path | None, typer.Option(help="NotoColorEmoji.ttf; default: fetched with apt-get.")] = None,
    limit: Annotated[int | None, typer.Option(min=64, help="Only so many concepts, for a quick try.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keeps the packages; default: .cache beside the output.")] = None,
    samples_per_shard: PerShard = EMOJI_SAMPLES_PER_SHARD,
    workers: Workers = DEFAULT_WORKERS,
    as_json: AsJson = False,
) -> None:
    """Emoji in four art styles with captions and nine categories; one style and whole families are held out."""
    records = emoji_records(
        cache or output.parent / ".cache" / "emoji",
        image_size=image_size,
        background=_choice("--background", background, Background),
        noto_font=noto_font,
        limit=limit,
    )
    options = ShardOptions(samples_per_shard=samples_per_shard, workers=workers)
    licenses = {str(record.meta["source"]): str(record.meta["license"]) for record in records}
    _make(records, GROUPS, output, "emoji", None, options, {"source": "emoji", "licenses": licenses}, as_json)


@shards_app.command("index", epilog="Example: m3i-scale shards index '/data/cc12m/{00000..01242}.tar'")
def index(
    shards: Annotated[list[str], typer.Argument(help="Folders, brace patterns or single shards.")],
    as_json: AsJson = False,
) -> None:
    """Scan shards and write `index/` beside them. Training does it where it is missing, but into its own cache."""
    found = []
    for pattern in shards:
        paths = expand_shards(pattern)
        for folder in sorted({path.parent for path in paths}):
            found += build_index([path for path in paths if path.parent == folder], folder / "index")
    summary = {"shards": len(found), "samples": sum(map(len, found)), "bytes": sum(item.size for item in found)}
    _print(summary, as_json, f"{summary['shards']} shards, {summary['samples']} samples")


def _make(
    records: Sequence[Record],
    labels: Sequence[str],
    output: Path,
    name: str,
    split: str | None,
    options: ShardOptions,
    info: dict[str, Any],
    as_json: bool,
) -> None:
    with _progress(quiet=as_json) as tell:
        summary = make_shards(
            records,
            output,
            labels=labels,
            name=name,
            info=info,
            splits=None if split is None else parse_splits(split),
            options=options,
            progress=tell,
        )
    lines = [
        f"{output / which}: {facts['samples']} samples ({facts['with_label']} with label, {facts['with_caption']} with "
        f"caption, {facts['with_mask']} with mask) in {facts['shards']} shards"
        for which, facts in summary["splits"].items()
    ]
    lines += [f"left out: {count} × {reason}" for reason, count in summary["skipped"].items()]
    _print(summary, as_json, "\n".join(lines))


@contextmanager
def _progress(quiet: bool) -> Iterator[Tell | None]:
    if quiet:
        yield None
        return
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("samples", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(summary: dict[str, Any], as_json: bool, text: str) -> None:
    if as_json:
        print_json(summary)
    else:
        sys.stdout.write(text + "\n")


def _choice(option: str, value: str, kind: Any) -> Any:
    if value not in get_args(kind):
        raise ConfigError(f"{option} {value}", fix=f"one of {', '.join(get_args(kind))}")
    return value
