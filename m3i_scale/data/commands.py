"""`m3i-scale shards`: the commands; those for shards of others are in `tools`, further inputs in `inputs`.

What takes long to import is imported by the command that needs it: help has to come at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3i_scale.data.cut import ShardOptions
from m3i_scale.data.inputs import commands as inputs
from m3i_scale.data.option_sets import takes_shard_options
from m3i_scale.data.options import (
    AsJson,
    LabelsFile,
    Name,
    Output,
    Split,
    choice,
    made_lines,
    print_summary,
    sample_bar,
)
from m3i_scale.data.tools import commands as tools
from m3i_scale.data.tools import reshard
from m3i_scale.errors import ConfigError

if TYPE_CHECKING:
    from m3i_scale.data.records import Record

shards_app = typer.Typer(
    no_args_is_help=True, help="Make WebDataset shards; look at, mend and rearrange those you have."
)
make_app = typer.Typer(no_args_is_help=True, help="Make shards out of images.")
shards_app.add_typer(make_app, name="make")
shards_app.command(epilog="Example: m3i-scale shards check '/data/cc12m/{00000..01242}.tar'")(tools.check)
shards_app.command(epilog="Example: m3i-scale shards stats /data/shards/train --json")(tools.stats)
shards_app.command("peek", epilog="Example: m3i-scale shards peek /data/shards/train --output /data/sheet")(tools.look)
shards_app.command(epilog="Example: m3i-scale shards split /data/cc12m --output /data/c --shares train=0.99,val=0.01")(
    reshard.split
)
shards_app.command(epilog="Example: m3i-scale shards merge /data/a /data/b --output /data/both")(reshard.merge)
make_app.command(epilog="Example: m3i-scale shards make img2dataset --input /data/cc12m --output /data/c")(
    inputs.img2dataset
)
make_app.command(epilog="Example: m3i-scale shards make huggingface --input /data/food101 --output /data/f")(
    inputs.huggingface
)
make_app.command(epilog="Example: m3i-scale shards make webdataset --input /data/wds --output /data/w")(
    inputs.webdataset
)


@make_app.command(
    "imagefolder", epilog="Example: m3i-scale shards make imagefolder --input /data/birds --output /data/b"
)
@takes_shard_options
def make_imagefolder(
    input_folder: Annotated[
        Path, typer.Option("--input", help="One folder per class, images below; or such folders in train, val …")
    ],
    output: Output,
    options: ShardOptions,
    name: Name = "images",
    captions: Annotated[
        str, typer.Option(help="NAME.txt beside an image: auto (all have one or none has), none, optional, required")
    ] = "auto",
    layout: Annotated[
        str, typer.Option(help="classes: INPUT/CLASS/…, splits: INPUT/SPLIT/CLASS/…, auto: by the folders' names")
    ] = "auto",
    split: Split = None,
    as_json: AsJson = False,
) -> None:
    """A folder of images, one folder per class, captions beside."""
    from m3i_scale.data.imagefolder import Captions, FolderLayout, imagefolder_records

    records, labels = imagefolder_records(
        input_folder, choice("--captions", captions, Captions), choice("--layout", layout, FolderLayout)
    )
    _make(records, labels, output, name, split, options, {"source": "imagefolder"}, as_json)


@make_app.command(
    "manifest", epilog="Example: m3i-scale shards make manifest --input /data/photos.csv --output /data/p"
)
@takes_shard_options
def make_manifest(
    manifest: Annotated[Path, typer.Option("--input", help="A .csv, .tsv, .parquet or .jsonl file.")],
    output: Output,
    options: ShardOptions,
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
    labels_file: LabelsFile = None,
    split: Split = None,
    as_json: AsJson = False,
) -> None:
    """A table of image paths, captions and labels."""
    from m3i_scale.data.sources import Columns, manifest_records, read_labels

    records, labels = manifest_records(
        manifest,
        columns=Columns(path_column, caption_column, label_column, split_column, mask_column),
        root=root,
        labels=None if labels_file is None else read_labels(labels_file),
    )
    _make(records, labels, output, name, split, options, {"source": "manifest"}, as_json)


@shards_app.command("index", epilog="Example: m3i-scale shards index '/data/cc12m/{00000..01242}.tar'")
def index(
    shards: Annotated[list[str], typer.Argument(help="Folders, brace patterns or single shards.")],
    as_json: AsJson = False,
) -> None:
    """Scan shards and write `index/` beside them. Training does it where it is missing, but into its own cache."""
    from m3i_scale.data.index import build_index
    from m3i_scale.data.shards import local_shards

    found = []
    for pattern in shards:
        paths = local_shards(pattern)
        for folder in sorted({path.parent for path in paths}):
            found += build_index([path for path in paths if path.parent == folder], folder / "index")
    summary = {"shards": len(found), "samples": sum(map(len, found)), "bytes": sum(item.size for item in found)}
    print_summary(summary, as_json, f"{summary['shards']} shards, {summary['samples']} samples")


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
    from m3i_scale.data.make import make_shards, parse_splits

    if split is not None and all(record.split is not None for record in records):
        raise ConfigError(
            "--split has no effect: every image is of a split already",
            where=f"--split {split}",
            why=f"the input has {', '.join(sorted({str(record.split) for record in records}))}",
            fix="leave it out; or, where the folders are classes: --layout classes",
        )
    with sample_bar(quiet=as_json) as tell:
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
    print_summary(summary, as_json, "\n".join(made_lines(summary, output)))
