"""CLI of `m3i-scale shards`: `make` with a command per kind of input, the tools, and `index`.

Slow imports are inside the commands, so that --help is fast.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3i_scale.options import AsJson, Command, Parts, choices, expanded
from m3i_scale.shards import tool_commands as tools
from m3i_scale.shards.options import (
    DEFAULTS,
    SIZE_OPTIONS,
    LabelsFile,
    Name,
    Output,
    ShardOptions,
    choice,
    parse_range,
    parse_splits,
    print_summary,
    sample_bar,
)

if TYPE_CHECKING:  # this import takes seconds, too long for --help
    from m3i_scale.shards.records import Input

CaptionField = Annotated[str | None, typer.Option(help="JSON field of the caption. Default: the .txt file.")]
Group = Annotated[str | None, typer.Option(help="JSON field; samples with the same value stay in one split.")]
_MAKE: Parts = {
    "output": (Output, inspect.Parameter.empty),
    "name": (Name, "images"),
    "split": (
        Annotated[str | None, typer.Option(metavar="SPLITS", help="Fractions by split, e.g. train=0.95,val=0.05.")],
        None,
    ),
    **SIZE_OPTIONS,
    "vocabulary": (
        Annotated[
            int,
            typer.Option(
                metavar="N", help="Vocabulary size of the tokenizer trained on the captions. 0: no tokenizer."
            ),
        ],
        DEFAULTS.vocabulary,
    ),
    "skip_bad": (
        Annotated[bool, typer.Option("--skip-bad", help="Skip and list unusable samples.")],
        DEFAULTS.skip_bad,
    ),
    "value_range": (
        Annotated[
            str | None,
            typer.Option(metavar="LOW,HIGH", help="Intensity window of images with more than 8 bits."),
        ],
        None,
    ),
    "as_json": (AsJson, False),
}


@dataclass(frozen=True)
class MakeOptions:
    """Options shared by all `shards make` commands."""

    output: Path
    name: str
    split: str | None
    options: ShardOptions
    as_json: bool

    def make(self, source: Input) -> None:
        """Make the shards and print a summary."""
        from m3i_scale.shards.make import make_shards, next_command, summary_lines

        with sample_bar(quiet=self.as_json) as progress:
            summary = make_shards(
                source,
                self.output,
                name=self.name,
                options=self.options,
                shares=None if self.split is None else parse_splits(self.split),
                progress=progress,
            )
        lines = [*summary_lines(summary, self.output), next_command(summary["splits"], self.output)]
        print_summary(summary, self.as_json, lines)


def takes_making(command: Command) -> Command:
    """Replace the parameter `making` of a command by the options of `shards make`."""
    return expanded(command, "making", _MAKE, _making)


def _making(
    output: Path,
    name: str,
    split: str | None,
    value_range: str | None,
    as_json: bool,
    **options: Any,
) -> MakeOptions:
    values = None if value_range is None else parse_range(value_range)
    return MakeOptions(output, name, split, ShardOptions(**options, value_range=values), as_json)


shards_app = typer.Typer(no_args_is_help=True, help="Create, inspect, repair and reshard WebDataset datasets.")
make_app = typer.Typer(no_args_is_help=True, help="Create shards from images.")
shards_app.add_typer(make_app, name="make")
shards_app.command(epilog="Example: m3i-scale shards check '/data/cc12m/{00000..01242}.tar'")(tools.check)
shards_app.command(epilog="Example: m3i-scale shards stats /data/shards/train --json")(tools.stats)
shards_app.command(epilog="Example: m3i-scale shards split /data/cc12m --output /data/c --shares train=0.99,val=0.01")(
    tools.split
)
shards_app.command(epilog="Example: m3i-scale shards merge /data/a /data/b --output /data/both")(tools.merge)


@shards_app.command(epilog="Example: m3i-scale shards index '/data/cc12m/{00000..01242}.tar'")
def index(
    shards: Annotated[list[str], typer.Argument(help="Folders of shards, brace patterns, or .tar files.")],
    as_json: AsJson = False,
) -> None:
    """Index shards: scan them and write `index/` next to them. Training scans shards without an index itself."""
    from m3i_scale.shards.existing_shards import local_shards
    from m3i_scale.shards.folder import index_folder

    indices = []
    for pattern in shards:
        paths = local_shards(pattern)
        for folder in sorted({path.parent for path in paths}):
            indices += index_folder(folder, [path for path in paths if path.parent == folder])
    summary = {"shards": len(indices), "samples": sum(map(len, indices)), "bytes": sum(item.size for item in indices)}
    print_summary(summary, as_json, [f"{summary['shards']} shards, {summary['samples']} samples"])


@make_app.command(epilog="Example: m3i-scale shards make imagefolder --input /data/birds --output /data/b")
@takes_making
def imagefolder(
    input_folder: Annotated[
        Path, typer.Option("--input", help="Folder with one folder of images per class, optionally in train, val, …")
    ],
    making: MakeOptions,
    captions: Annotated[
        str,
        typer.Option(
            **choices("auto", "none", "optional", "required"),
            help="Captions in NAME.txt next to the images. auto: for all images or none.",
        ),
    ] = "auto",
    layout: Annotated[
        str,
        typer.Option(
            **choices("auto", "classes", "splits"),
            help="classes: INPUT/CLASS/…, splits: INPUT/SPLIT/CLASS/…, auto: by the names of the folders.",
        ),
    ] = "auto",
) -> None:
    """Convert a folder of images: one folder per class, optional caption files."""
    from m3i_scale.shards.image_folders import Captions, FolderLayout, imagefolder_input

    kind, depth = choice("--captions", captions, Captions), choice("--layout", layout, FolderLayout)
    making.make(imagefolder_input(input_folder, kind, depth))


@make_app.command(epilog="Example: m3i-scale shards make manifest --input /data/photos.csv --output /data/p")
@takes_making
def manifest(
    table: Annotated[Path, typer.Option("--input", help="Table: .csv, .tsv, .parquet or .jsonl file.")],
    making: MakeOptions,
    root: Annotated[Path | None, typer.Option(help="Root of relative paths. Default: the folder of the table.")] = None,
    path_column: Annotated[str, typer.Option(help="Column of image paths.")] = "path",
    caption_column: Annotated[str, typer.Option(help="Column of captions.")] = "caption",
    label_column: Annotated[str, typer.Option(help="Column of class names or numbers.")] = "label",
    split_column: Annotated[str, typer.Option(help="Column of splits.")] = "split",
    mask_column: Annotated[
        str | None, typer.Option(help="Column of mask paths: PNGs with the class of every pixel.")
    ] = None,
    labels_file: LabelsFile = None,
) -> None:
    """Convert a table of image paths, captions and labels."""
    from m3i_scale.shards.manifest import TableColumns, manifest_input
    from m3i_scale.shards.records import read_class_names

    columns = TableColumns(path_column, caption_column, label_column, split_column, mask_column)
    labels = None if labels_file is None else read_class_names(labels_file)
    making.make(manifest_input(table, columns=columns, root=root, labels=labels))


@make_app.command(
    epilog="Example: m3i-scale shards make masks --images /data/ADEChallengeData2016/images --masks "
    "/data/ADEChallengeData2016/annotations --labels /data/ADEChallengeData2016/objectInfo150.txt --reduce-zero-label "
    "--output /data/ade"
)
@takes_making
def masks(
    images: Annotated[Path, typer.Option(help="Folder of images. Top-level folders train, val, … are splits.")],
    masks_folder: Annotated[
        Path,
        typer.Option("--masks", help="Folder of PNG masks with the same relative names."),
    ],
    labels_file: Annotated[
        Path,
        typer.Option("--labels", help="Class names: JSON list, one per line, or ADE20k's objectInfo150.txt."),
    ],
    making: MakeOptions,
    reduce_zero_label: Annotated[
        bool, typer.Option("--reduce-zero-label", help="0 is no class, and classes start at 1, as in ADE20k.")
    ] = False,
) -> None:
    """Convert images and segmentation masks, paired by name."""
    from m3i_scale.shards.image_folders import masks_input, read_mask_labels

    labels = read_mask_labels(labels_file, reduce_zero_label=reduce_zero_label)
    skip_bad = making.options.skip_bad
    making.make(masks_input(images, masks_folder, labels, reduce_zero_label=reduce_zero_label, skip_bad=skip_bad))


@make_app.command(epilog="Example: m3i-scale shards make coco --input /data/coco --output /data/coco-shards")
@takes_making
def coco(
    inputs: Annotated[
        list[Path],
        typer.Option(
            "--input", help="Folder in COCO's layout, or annotation file of COCO or LVIS; repeat for several."
        ),
    ],
    making: MakeOptions,
    images: Annotated[
        Path | None, typer.Option(help="Root of the images. Default: the folder of the annotation file.")
    ] = None,
) -> None:
    """Convert images with boxes and masks from COCO or LVIS annotation files."""
    from m3i_scale.shards.coco import coco_input

    shares, skip_bad = making.split is not None, making.options.skip_bad
    making.make(coco_input(inputs, images, shares=shares, skip_bad=skip_bad))


@make_app.command(epilog="Example: m3i-scale shards make huggingface --input /data/food101 --output /data/f")
@takes_making
def huggingface(
    source: Annotated[Path, typer.Option("--input", help="Folder written by save_to_disk, or Parquet file or folder.")],
    making: MakeOptions,
    image_column: Annotated[str | None, typer.Option(help="Column of images. Default: the one of type Image.")] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Column of captions, or none. Default: caption or text.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of labels, or none. Default: the one of type ClassLabel.")
    ] = None,
    key_column: Annotated[str | None, typer.Option(help="Column of keys. Default: row numbers.")] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Column; rows with the same value stay in one split.")
    ] = None,
) -> None:
    """Convert a Hugging Face dataset, saved to disk or as Parquet. Its splits are kept."""
    from m3i_scale.shards.arrow import Columns, huggingface_input

    columns = Columns(image_column, caption_column, label_column, key_column, group_column)
    making.make(huggingface_input(source, columns))


@make_app.command(epilog="Example: m3i-scale shards make webdataset --input /data/wds --output /data/w")
@takes_making
def webdataset(
    shards: Annotated[str, typer.Option("--input", help="Folder of shards, brace pattern, or one .tar file.")],
    making: MakeOptions,
    caption_field: CaptionField = None,
    labels_file: LabelsFile = None,
    group: Group = None,
) -> None:
    """Convert existing shards: validate samples, convert other image formats to PNG, and train a tokenizer."""
    from m3i_scale.shards.existing_shards import webdataset_input
    from m3i_scale.shards.records import read_class_names

    labels, workers = None if labels_file is None else read_class_names(labels_file), making.options.workers
    making.make(webdataset_input(shards, labels=labels, caption_field=caption_field, group=group, workers=workers))
