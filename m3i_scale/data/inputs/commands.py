"""`m3i-scale shards make img2dataset | huggingface | webdataset`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3i_scale.data.cut import Cut, ShardOptions
from m3i_scale.data.option_sets import takes_shard_options
from m3i_scale.data.options import (
    AsJson,
    LabelsFile,
    Name,
    Output,
    Split,
    made_lines,
    print_summary,
    sample_bar,
)
from m3i_scale.errors import ConfigError

if TYPE_CHECKING:  # importing it takes seconds, which --help has not
    from m3i_scale.data.inputs.streamed import Input

CaptionField = Annotated[str | None, typer.Option(help="Field of the json members with the caption; default: txt.")]
Group = Annotated[str | None, typer.Option(help="Field of the json members; samples of one value share a split.")]


@takes_shard_options
def img2dataset(
    input_folder: Annotated[Path, typer.Option("--input", help="img2dataset's output_folder.")],
    output: Output,
    options: ShardOptions,
    name: Name = "images",
    caption_field: CaptionField = None,
    skip_incomplete: Annotated[
        bool, typer.Option("--skip-incomplete", help="Leave out shards that img2dataset did not finish.")
    ] = False,
    split: Split = None,
    group: Group = None,
    as_json: AsJson = False,
) -> None:
    """What img2dataset downloaded, as tars or as files, held against its tables."""
    from m3i_scale.data.inputs.webdataset import img2dataset_input

    source = img2dataset_input(
        input_folder, caption_field=caption_field, group=group, workers=options.workers, skip_incomplete=skip_incomplete
    )
    _make(source, output, name, split, options, as_json)


@takes_shard_options
def huggingface(
    source: Annotated[Path, typer.Option("--input", help="A folder of save_to_disk, or Parquet: a file or a folder.")],
    output: Output,
    options: ShardOptions,
    name: Name = "images",
    image_column: Annotated[str | None, typer.Option(help="Default: the one of type Image.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Default: caption or text; none: no captions.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Default: the one ClassLabel; none: no labels.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Keys of the samples; default: the rows' numbers.")] = None,
    group_column: Annotated[str | None, typer.Option(help="Rows of one value share a split.")] = None,
    split: Split = None,
    as_json: AsJson = False,
) -> None:
    """A data set of Hugging Face `datasets`, saved or as Parquet; its splits are kept."""
    from m3i_scale.data.inputs.columns import Columns
    from m3i_scale.data.inputs.huggingface import huggingface_input

    found = huggingface_input(source, Columns(image_column, caption_column, label_column, key_column, group_column))
    if split is not None and all(file.split is not None for file in found.files):
        raise ConfigError("--split does nothing: the data set has splits", fix="leave it out")
    _make(found, output, name, split, options, as_json)


@takes_shard_options
def webdataset(
    shards: Annotated[str, typer.Option("--input", help="A folder, a brace pattern or one tar.")],
    output: Output,
    options: ShardOptions,
    name: Name = "images",
    caption_field: CaptionField = None,
    labels_file: LabelsFile = None,
    split: Split = None,
    group: Group = None,
    as_json: AsJson = False,
) -> None:
    """Existing shards: every sample is verified, images of other formats become PNGs, captions train a tokenizer."""
    from m3i_scale.data.inputs.webdataset import webdataset_input
    from m3i_scale.data.sources import read_labels

    source = webdataset_input(
        shards,
        labels=None if labels_file is None else read_labels(labels_file),
        caption_field=caption_field,
        group=group,
        workers=options.workers,
    )
    _make(source, output, name, split, options, as_json)


def _make(source: Input, output: Path, name: str, split: str | None, options: ShardOptions, as_json: bool) -> None:
    from m3i_scale.data.inputs.streamed import make_streamed
    from m3i_scale.data.make import parse_splits

    with sample_bar(quiet=as_json) as tell:
        summary = make_streamed(
            source,
            output,
            name=name,
            cut=Cut(options),
            shares=None if split is None else parse_splits(split),
            progress=tell,
        )
    print_summary(summary, as_json, "\n".join(made_lines(summary, output)))
