"""CLI of `m3i-scale shards`: `make` with a command per kind of input, the tools, and `index`.

Slow imports are inside the commands, so that --help is fast.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3i_scale.options import AsJson, Command, Parts, expanded
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

CaptionField = Annotated[str | None, typer.Option(help="JSON field of the caption; default: the txt file.")]
Group = Annotated[str | None, typer.Option(help="JSON field; samples with the same value share a split.")]
_MAKE: Parts = {
    "output": (Output, inspect.Parameter.empty),
    "name": (Name, "images"),
    "split": (
        Annotated[str | None, typer.Option(help="Fractions of samples by split, drawn by hash: train=0.95,val=0.05")],
        None,
    ),
    **SIZE_OPTIONS,
    "vocabulary": (
        Annotated[int, typer.Option(help="Size of the tokenizer trained on the captions; 0 trains none.")],
        DEFAULTS.vocabulary,
    ),
    "skip_bad": (
        Annotated[bool, typer.Option("--skip-bad", help="Skip and list unusable samples.")],
        DEFAULTS.skip_bad,
    ),
    "value_range": (
        Annotated[
            str | None,
            typer.Option(help="LOW,HIGH: intensity window of images with more than 8 bits."),
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
make_app = typer.Typer(no_args_is_help=True, help="Make shards out of images.")
shards_app.add_typer(make_app, name="make")
shards_app.command(epilog="Example: m3i-scale shards check '/data/cc12m/{00000..01242}.tar'")(tools.check)
shards_app.command(epilog="Example: m3i-scale shards stats /data/shards/train --json")(tools.stats)
shards_app.command(epilog="Example: m3i-scale shards split /data/cc12m --output /data/c --shares train=0.99,val=0.01")(
    tools.split
)
shards_app.command(epilog="Example: m3i-scale shards merge /data/a /data/b --output /data/both")(tools.merge)


@shards_app.command(epilog="Example: m3i-scale shards index '/data/cc12m/{00000..01242}.tar'")
def index(
    shards: Annotated[list[str], typer.Argument(help="Folders, brace patterns or single shards.")],
    as_json: AsJson = False,
) -> None:
    """Scan shards and write `index/` next to them. Otherwise training scans them and writes to its cache."""
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
        Path, typer.Option("--input", help="One folder per class, images below; or such folders in train, val …")
    ],
    making: MakeOptions,
    captions: Annotated[
        str, typer.Option(help="NAME.txt next to an image: auto (all or none), none, optional, required")
    ] = "auto",
    layout: Annotated[
        str, typer.Option(help="classes: INPUT/CLASS/…, splits: INPUT/SPLIT/CLASS/…, auto: by the folders' names")
    ] = "auto",
) -> None:
    """Convert a folder of images: one folder per class, optional caption files."""
    from m3i_scale.shards.image_folders import Captions, FolderLayout, imagefolder_input

    kind, depth = choice("--captions", captions, Captions), choice("--layout", layout, FolderLayout)
    making.make(imagefolder_input(input_folder, kind, depth))


@make_app.command(epilog="Example: m3i-scale shards make manifest --input /data/photos.csv --output /data/p")
@takes_making
def manifest(
    table: Annotated[Path, typer.Option("--input", help="A .csv, .tsv, .parquet or .jsonl file.")],
    making: MakeOptions,
    root: Annotated[
        Path | None, typer.Option(help="Root of relative paths; default: the folder of the manifest.")
    ] = None,
    path_column: Annotated[str, typer.Option(help="Column of image paths.")] = "path",
    caption_column: Annotated[str, typer.Option(help="Column of captions.")] = "caption",
    label_column: Annotated[str, typer.Option(help="Column of labels, names or numbers.")] = "label",
    split_column: Annotated[str, typer.Option(help="Column of splits.")] = "split",
    mask_column: Annotated[
        str | None, typer.Option(help="Column of paths of masks: PNGs, the class of every pixel.")
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
    images: Annotated[Path, typer.Option(help="Folder of images; top-level folders train, val … are splits.")],
    masks_folder: Annotated[
        Path,
        typer.Option("--masks", help="Folder of PNG masks with the same relative names: the class of every pixel."),
    ],
    labels_file: Annotated[
        Path,
        typer.Option("--labels", help="Class names: a JSON list, one per line, or ADE20k's objectInfo150.txt."),
    ],
    making: MakeOptions,
    reduce_zero_label: Annotated[
        bool, typer.Option("--reduce-zero-label", help="0 means no class, and classes start at 1, as in ADE20k.")
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
        typer.Option("--input", help="Folder in COCO's layout, or an annotation file of COCO or LVIS; repeatable."),
    ],
    making: MakeOptions,
    images: Annotated[
        Path | None, typer.Option(help="Root of image names; default: the folder of the annotation file.")
    ] = None,
) -> None:
    """Convert images with boxes and masks from COCO or LVIS annotation files."""
    from m3i_scale.shards.coco import coco_input

    shares, skip_bad = making.split is not None, making.options.skip_bad
    making.make(coco_input(inputs, images, shares=shares, skip_bad=skip_bad))


@make_app.command(epilog="Example: m3i-scale shards make huggingface --input /data/food101 --output /data/f")
@takes_making
def huggingface(
    source: Annotated[Path, typer.Option("--input", help="A folder of save_to_disk, or Parquet: a file or a folder.")],
    making: MakeOptions,
    image_column: Annotated[str | None, typer.Option(help="Default: the one of type Image.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Default: caption or text; none: no captions.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Default: the one ClassLabel; none: no labels.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Column of keys; default: row numbers.")] = None,
    group_column: Annotated[str | None, typer.Option(help="Rows with the same value share a split.")] = None,
) -> None:
    """Convert a Hugging Face dataset, saved or as Parquet; keeps its splits."""
    from m3i_scale.shards.arrow import Columns, huggingface_input

    columns = Columns(image_column, caption_column, label_column, key_column, group_column)
    making.make(huggingface_input(source, columns))


@make_app.command(epilog="Example: m3i-scale shards make webdataset --input /data/wds --output /data/w")
@takes_making
def webdataset(
    shards: Annotated[str, typer.Option("--input", help="A folder, a brace pattern or one tar.")],
    making: MakeOptions,
    caption_field: CaptionField = None,
    labels_file: LabelsFile = None,
    group: Group = None,
) -> None:
    """Convert existing shards: validates samples, converts other formats to PNG, trains a tokenizer on captions."""
    from m3i_scale.shards.existing_shards import webdataset_input
    from m3i_scale.shards.records import read_class_names

    labels, workers = None if labels_file is None else read_class_names(labels_file), making.options.workers
    making.make(webdataset_input(shards, labels=labels, caption_field=caption_field, group=group, workers=workers))
