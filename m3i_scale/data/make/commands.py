"""`m3i-scale shards make`: a command per kind of input. What takes long to import is imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m3i_scale.data.options import LabelsFile, Making, choice, takes_making

CaptionField = Annotated[str | None, typer.Option(help="Field of the json members with the caption; default: txt.")]
Group = Annotated[str | None, typer.Option(help="Field of the json members; samples of one value share a split.")]

make_app = typer.Typer(no_args_is_help=True, help="Make shards out of images.")


@make_app.command(epilog="Example: m3i-scale shards make imagefolder --input /data/birds --output /data/b")
@takes_making
def imagefolder(
    input_folder: Annotated[
        Path, typer.Option("--input", help="One folder per class, images below; or such folders in train, val …")
    ],
    making: Making,
    captions: Annotated[
        str, typer.Option(help="NAME.txt beside an image: auto (all have one or none has), none, optional, required")
    ] = "auto",
    layout: Annotated[
        str, typer.Option(help="classes: INPUT/CLASS/…, splits: INPUT/SPLIT/CLASS/…, auto: by the folders' names")
    ] = "auto",
) -> None:
    """A folder of images, one folder per class, captions beside."""
    from m3i_scale.data.make.folder import Captions, FolderLayout, imagefolder_input

    kind, depth = choice("--captions", captions, Captions), choice("--layout", layout, FolderLayout)
    making.make(imagefolder_input(input_folder, kind, depth))


@make_app.command(epilog="Example: m3i-scale shards make manifest --input /data/photos.csv --output /data/p")
@takes_making
def manifest(
    table: Annotated[Path, typer.Option("--input", help="A .csv, .tsv, .parquet or .jsonl file.")],
    making: Making,
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
) -> None:
    """A table of image paths, captions and labels."""
    from m3i_scale.data.make.table import TableColumns, manifest_input, read_labels

    columns = TableColumns(path_column, caption_column, label_column, split_column, mask_column)
    labels = None if labels_file is None else read_labels(labels_file)
    making.make(manifest_input(table, columns=columns, root=root, labels=labels))


@make_app.command(epilog="Example: m3i-scale shards make img2dataset --input /data/cc12m --output /data/c")
@takes_making
def img2dataset(
    input_folder: Annotated[Path, typer.Option("--input", help="img2dataset's output_folder.")],
    making: Making,
    caption_field: CaptionField = None,
    skip_incomplete: Annotated[
        bool, typer.Option("--skip-incomplete", help="Leave out shards that img2dataset did not finish.")
    ] = False,
    group: Group = None,
) -> None:
    """Take what img2dataset downloaded, as tars or as files, and compare it with its tables."""
    from m3i_scale.data.make.img2dataset import img2dataset_input

    workers = making.options.workers
    making.make(
        img2dataset_input(
            input_folder, caption_field=caption_field, group=group, workers=workers, skip_incomplete=skip_incomplete
        )
    )


@make_app.command(epilog="Example: m3i-scale shards make huggingface --input /data/food101 --output /data/f")
@takes_making
def huggingface(
    source: Annotated[Path, typer.Option("--input", help="A folder of save_to_disk, or Parquet: a file or a folder.")],
    making: Making,
    image_column: Annotated[str | None, typer.Option(help="Default: the one of type Image.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Default: caption or text; none: no captions.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Default: the one ClassLabel; none: no labels.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Keys of the samples; default: the rows' numbers.")] = None,
    group_column: Annotated[str | None, typer.Option(help="Rows of one value share a split.")] = None,
) -> None:
    """A data set of Hugging Face `datasets`, saved or as Parquet; its splits are kept."""
    from m3i_scale.data.make.columns import Columns
    from m3i_scale.data.make.huggingface import huggingface_input

    columns = Columns(image_column, caption_column, label_column, key_column, group_column)
    making.make(huggingface_input(source, columns))


@make_app.command(epilog="Example: m3i-scale shards make webdataset --input /data/wds --output /data/w")
@takes_making
def webdataset(
    shards: Annotated[str, typer.Option("--input", help="A folder, a brace pattern or one tar.")],
    making: Making,
    caption_field: CaptionField = None,
    labels_file: LabelsFile = None,
    group: Group = None,
) -> None:
    """Existing shards: every sample is verified, images of other formats become PNGs, captions train a tokenizer."""
    from m3i_scale.data.make.table import read_labels
    from m3i_scale.data.make.wds import webdataset_input

    labels, workers = None if labels_file is None else read_labels(labels_file), making.options.workers
    making.make(webdataset_input(shards, labels=labels, caption_field=caption_field, group=group, workers=workers))
