"""Hugging Face datasets, as saved by `save_to_disk` or as Parquet files, as input of `make`; read with pyarrow only.

Image, caption and label columns are detected by their type, or by their name if several are candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from typing_extensions import override

from m3i_scale.errors import ConfigError, DataError, did_you_mean
from m3i_scale.files import read_json
from m3i_scale.shards.records import Input, Record, reading

NONE = "none"
"""Column name that selects no column."""
BATCH_ROWS = 64
_parquet_file: Any = pyarrow.parquet.ParquetFile


@dataclass(frozen=True)
class Columns:
    """Names of columns by role. Image, caption and label are detected if they are None."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    key: str | None = None
    group: str | None = None


def find_columns(schema: Any, columns: Columns, where: str) -> tuple[Columns, list[str]]:
    """Detect the columns in use, and the class names of the label column.

    The image is the only column of type Image (or of a struct with bytes and path). The label is the only ClassLabel.
    The caption is the only existing column of `caption`, `text`, `captions` and `texts`.
    """
    names = list(schema.names)
    for name in vars(columns).values():
        if name is not None and name != NONE and name not in names:
            raise ConfigError(f"unknown column '{name}'", where=where, fix=did_you_mean(name, names))
    features = _features(schema, where)
    images = [name for name in names if _is_image(features.get(name), schema.field(name).type)]
    labels = [name for name in names if _kind(features.get(name)) == "ClassLabel"]
    texts = [name for name in names if name in ("caption", "text", "captions", "texts")]
    image = _one("image", columns.image, images, where)
    if image is None:
        raise ConfigError("no column of images found", where=where, fix="name it with --image-column")
    label = _one("label", columns.label, labels, where)
    caption = _one("caption", columns.caption, texts, where)
    return replace(columns, image=image, caption=caption, label=label), _class_names(
        features.get(label or ""), label, where
    )


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .parquet file, a folder of such files, or else an Arrow stream, as dicts by column name.

    Only few rows are in memory at a time.
    """
    if path.is_dir():  # Spark and dask write a table as a folder
        for part in sorted(path.glob("*.parquet")):
            yield from read_rows(part, columns)
    elif columns == []:
        yield from ({} for _ in range(row_count(path)))
    else:
        with _opened(path) as table:
            if _is_parquet(path):
                for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                    yield from batch.to_pylist()
                return
            for batch in table:
                picked = batch if columns is None else batch.select(columns)
                for start in range(0, picked.num_rows, BATCH_ROWS):
                    yield from picked.slice(start, BATCH_ROWS).to_pylist()


def row_count(path: Path) -> int:
    """Return the number of rows of a file from its headers."""
    with _opened(path) as table:
        return int(table.metadata.num_rows) if _is_parquet(path) else sum(int(batch.num_rows) for batch in table)


def schema_of(path: Path) -> Any:
    """Return the Arrow schema of a file, with the metadata of `datasets`."""
    with _opened(path) as table:
        return table.schema_arrow if _is_parquet(path) else table.schema


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a Parquet file, or else an Arrow stream."""
    with reading(path, pyarrow.ArrowException, fix="download it again"):
        if _is_parquet(path):
            with _parquet_file(path) as table:
                yield table
        else:
            with pyarrow.memory_map(str(path)) as memory, pyarrow.ipc.open_stream(memory) as stream:
                yield stream


def python_value(value: Any) -> Any:
    """Convert a cell to JSON types. Raise a TypeError if its value has none."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError("not a JSON number")
        return value
    if isinstance(value, list):
        return [python_value(item) for item in value]
    if isinstance(value, dict):
        return {str(name): python_value(item) for name, item in value.items()}
    raise TypeError(type(value).__name__)


def _one(role: str, chosen: str | None, candidates: list[str], where: str) -> str | None:
    if chosen is not None:
        return None if chosen == NONE else chosen
    if len(candidates) > 1:
        raise ConfigError(
            f"several columns could be the {role}: {', '.join(candidates)}",
            where=where,
            fix=f"choose with --{role}-column",
        )
    return candidates[0] if candidates else None


def _features(schema: Any, where: str) -> Mapping[str, Any]:
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the description of the columns is corrupt: {error!r}", where=where, fix="save the dataset again"
        ) from None
    return features if isinstance(features, dict) else {}


def _kind(feature: Any) -> str | None:
    return feature.get("_type") if isinstance(feature, dict) else None


def _is_image(feature: Any, kind: Any) -> bool:
    if feature is not None:
        return _kind(feature) == "Image"
    return pyarrow.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(n).name for n in range(kind.num_fields)}


def _class_names(feature: Any, label: str | None, where: str) -> list[str]:
    if label is None:
        return []
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"the column '{label}' has no class names",
            where=where,
            fix="cast it to ClassLabel (datasets.class_encode_column), or leave labels out: --label-column none",
        )
    return names


TableFile = tuple[Path, str | None]
"""A file of rows, and its split; None: assigned by the split rule."""


class TableInput(Input):
    """Rows of Arrow or Parquet files as records, with few rows in memory."""

    def __init__(self, files: Sequence[TableFile], columns: Columns, labels: Sequence[str]) -> None:
        super().__init__(labels)
        self.files, self.columns = files, columns
        self._left_out: set[str] = set()  # columns that JSON cannot represent

    @override
    def outlines(self) -> Iterator[Record]:
        columns = [name for name in (self.columns.group, self.columns.key) if name is not None]
        for outline, values in self._rows(columns):
            yield replace(outline, group=None if self.columns.group is None else str(values[self.columns.group]))

    @override
    def records(self) -> Iterator[Record]:
        for outline, values in self._rows(None):
            image, label, problem = b"", None, None
            try:
                image = _image(values[self.columns.image or ""], outline.where)
                label = self._label(values, outline.where)
            except DataError as error:
                problem = error
            yield replace(
                outline,
                image=image,
                caption=None if self.columns.caption is None else _text(values[self.columns.caption]),
                label=label,
                meta=self._meta(values),
                size=max(len(image), outline.size),
                problem=problem,
            )

    @override
    def info(self) -> dict[str, Any]:
        return {"source": "huggingface", **({"columns_left_out": sorted(self._left_out)} if self._left_out else {})}

    def _meta(self, row: Mapping[str, Any]) -> dict[str, Any]:
        meta = {}
        for name, value in row.items():
            if name in (self.columns.image, self.columns.caption, self.columns.label) or value is None:
                continue
            try:
                meta[name] = python_value(value)
            except TypeError:
                self._left_out.add(name)
        return meta

    def _label(self, row: Mapping[str, Any], where: str) -> int | None:
        label = None if self.columns.label is None else row[self.columns.label]
        if label is None or label == -1:  # the value of `datasets` for "no label"
            return None
        if not (isinstance(label, int) and 0 <= label < len(self.labels)):
            raise DataError(
                f"the label is out of range: {label!r:.40}",
                where=where,
                fix="correct the label, or leave out labels: --label-column none",
            )
        return label

    def _rows(self, columns: list[str] | None) -> Iterator[tuple[Record, dict[str, Any]]]:
        """Yield the outline of every row and its values. The size is the mean of the rows of the file."""
        numbers: dict[str | None, int] = {}
        for path, split in self.files:
            row_bytes = 0
            first = numbers.get(split, 0)
            number = -1
            for number, values in enumerate(read_rows(path, columns)):
                if not number:
                    row_bytes = path.stat().st_size // max(1, row_count(path))
                where = f"{path}, row {number + 1}"
                key = f"{first + number:09d}" if split is None else f"{split}-{first + number:09d}"
                if self.columns.key is not None:
                    key = _key(values[self.columns.key], where)
                yield Record(key, split=split, size=row_bytes, where=where), values
            numbers[split] = first + number + 1


def huggingface_input(source: Path, columns: Columns) -> TableInput:
    """Open a `datasets.save_to_disk` folder (also of several splits), a Parquet file, or a folder of Parquet files.

    The split of a Parquet file is the start of its name, as on the Hub: `train-00000-of-00004`.
    """
    files = find_files(source)
    (first, _), *others = files
    schema = schema_of(first)
    for path, _ in others:
        if not schema_of(path).equals(schema, check_metadata=False):
            raise DataError(
                "all files of the dataset must have the same columns",
                where=f"{first}, {path}",
                fix="pack the files one by one",
            )
    return TableInput(files, *find_columns(schema, columns, str(first)))


def find_files(source: Path) -> list[TableFile]:
    """List the files of a dataset, in order."""
    if source.is_file() and source.suffix == ".parquet":
        return [(source, None)]
    if (source / "dataset_dict.json").is_file():
        splits = _json(source / "dataset_dict.json").get("splits", [])
        return [file for split in splits for file in _saved(_inside(source, split), str(split))]
    if (source / "state.json").is_file():
        return _saved(source, None)
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else []
    if not files:
        raise DataError(
            "the source is not a Hugging Face dataset",
            where=str(source),
            fix="use a folder that datasets.save_to_disk wrote, a .parquet file, or a folder of such files",
        )
    return [(path, _split_of(path)) for path in files]


def _saved(folder: Path, split: str | None) -> list[TableFile]:
    names = [entry.get("filename") for entry in _json(folder / "state.json").get("_data_files", [])]
    if not names:
        raise DataError(
            "the saved dataset lists no files",
            where=str(folder / "state.json"),
            fix="save the dataset again with datasets.save_to_disk",
        )
    return [(_inside(folder, name), split) for name in names]


def _inside(folder: Path, name: Any) -> Path:
    """Return the path of a file named in JSON: a direct child, or a downloaded dataset could name any file."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise DataError(
            f"the dataset must list files of its folder only, got {name!r:.80}",
            where=str(folder),
            fix="save the dataset again with datasets.save_to_disk",
        )
    return folder / name


def _split_of(path: Path) -> str | None:
    """Return the split of a file: train for `train-00000-of-00004.parquet` and `train/0000.parquet`."""
    head = path.stem.partition("-")[0] if "-of-" in path.stem else path.parent.name
    return head if head in ("train", "test", "val", "validation", "dev") else None


def _image(value: Any, where: str) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        fix = "save it with its images embedded (save_to_disk and to_parquet do), or use `make manifest` for paths"
        raise DataError("the row has no image", where=where, fix=fix)
    return data


def _text(value: Any) -> str | None:
    """Return the caption; a list becomes one caption per line (`captions: lines` of a dataset)."""
    if isinstance(value, list):
        return "\n".join(" ".join(str(item).split()) for item in value if item) or None
    return None if value is None else str(value).strip() or None


def _key(value: Any, where: str) -> str:
    text = "" if value is None else str(value)
    if not text or "." in text or "/" in text or text.startswith("__") or not text.isprintable() or len(text) > 200:
        raise DataError(
            f"a key must not be empty or have dots or slashes, got {text!r:.80}",
            where=where,
            fix="choose another column with --key-column",
        )
    return text


def _json(path: Path) -> dict[str, Any]:
    with reading(path, ValueError):
        value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(
            "the file must be a JSON object", where=str(path), fix="save the dataset again with datasets.save_to_disk"
        )
    return value
