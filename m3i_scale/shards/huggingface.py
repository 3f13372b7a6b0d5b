"""Hugging Face `datasets` as input of `make`: `save_to_disk` folders and Parquet files, read with pyarrow only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3i_scale.data.categories import Categories
from m3i_scale.errors import DataError
from m3i_scale.files import read_json
from m3i_scale.shards.arrow import Columns, Roles, find_roles, python_value, read_rows, row_count, schema_of
from m3i_scale.shards.layout import Outline
from m3i_scale.shards.records import Record, reading


@dataclass(frozen=True)
class TableFile:
    """A file of rows, with its split."""

    path: Path
    split: str | None
    """None: assigned by the split rule."""


@dataclass
class TableInput:
    """Rows of Arrow or Parquet files as records, with few rows in memory."""

    files: Sequence[TableFile]
    roles: Roles
    labels: list[str]
    left_out: set[str] = field(default_factory=set)
    """Columns that JSON cannot represent."""
    mask_labels: list[str] | None = None
    """Not available in this input."""
    categories: Categories | None = None
    """Not available in this input."""

    def outlines(self) -> Iterator[Outline]:
        """See `Input`."""
        columns = [name for name in (self.roles.group, self.roles.key) if name is not None]
        for row in self._rows(columns):
            group = None if self.roles.group is None else str(row.values[self.roles.group])
            yield Outline(row.key, row.size, group, row.file.split, row.where)

    def records(self) -> Iterator[Record]:
        """See `Input`."""
        for row in self._rows(None):
            image, label, fault = b"", None, None
            try:
                image = _image(row.values[self.roles.image], row.where)
                label = self._label(row)
            except DataError as error:
                fault = error
            caption = None if self.roles.caption is None else _text(row.values[self.roles.caption])
            size, split = max(len(image), row.size), row.file.split
            meta = self._meta(row.values)
            yield Record(row.key, image, caption, label, meta, split, size=size, where=row.where, fault=fault)

    def info(self) -> dict[str, Any]:
        """See `Input`."""
        return {"source": "huggingface", **({"columns_left_out": sorted(self.left_out)} if self.left_out else {})}

    def labels_of(self, split: str | None) -> Iterator[tuple[str, int | None]]:
        """Yield key and label of every row of a split without reading images; out-of-range labels become None."""
        for row in self._rows([name for name in (self.roles.label, self.roles.key) if name is not None]):
            if row.file.split == split:
                try:
                    yield row.key, self._label(row)
                except DataError:
                    yield row.key, None

    def _meta(self, row: Mapping[str, Any]) -> dict[str, Any]:
        meta = {}
        for name, value in row.items():
            if name in self.roles.used() or value is None:
                continue
            try:
                meta[name] = python_value(value)
            except TypeError:
                self.left_out.add(name)
        return meta

    def _label(self, row: _Row) -> int | None:
        label = None if self.roles.label is None else row.values[self.roles.label]
        if label is None or label == -1:  # the value of `datasets` for "no label"
            return None
        if not (isinstance(label, int) and 0 <= label < len(self.labels)):
            raise DataError(f"the label is out of range: {label!r:.40}", where=row.where)
        return label

    def _rows(self, columns: list[str] | None) -> Iterator[_Row]:
        numbers: dict[str | None, int] = {}
        for file in self.files:
            row_bytes = 0
            first = numbers.get(file.split, 0)
            number = -1
            for number, values in enumerate(read_rows(file.path, columns)):
                if not number:
                    row_bytes = file.path.stat().st_size // max(1, row_count(file.path))
                where = f"{file.path}, row {number + 1}"
                key = f"{first + number:09d}" if file.split is None else f"{file.split}-{first + number:09d}"
                if self.roles.key is not None:
                    key = _key(values[self.roles.key], where)
                yield _Row(file, key, values, row_bytes, where)
            numbers[file.split] = first + number + 1


@dataclass(frozen=True)
class _Row:
    file: TableFile
    key: str
    values: dict[str, Any]
    size: int
    """Mean size in bytes of a row of the file."""
    where: str


def huggingface_input(source: Path, columns: Columns) -> TableInput:
    """Open a `datasets.save_to_disk` folder (also of several splits), a Parquet file, or a folder of Parquet files.

    The split of a Parquet file is the start of its name, as on the Hub: `train-00000-of-00004`.

    Args:
        source: file or folder.
        columns: names of the columns by role; see `find_roles`.
    """
    files = find_files(source)
    schema = schema_of(files[0].path)
    for file in files[1:]:
        if not schema_of(file.path).equals(schema, check_metadata=False):
            raise DataError("its files have different columns", where=f"{files[0].path}, {file.path}")
    roles, labels = find_roles(schema, columns, str(files[0].path))
    return TableInput(files, roles, labels)


def find_files(source: Path) -> list[TableFile]:
    """List the files of a dataset, in order."""
    if source.is_file() and source.suffix == ".parquet":
        return [TableFile(source, None)]
    if (source / "dataset_dict.json").is_file():
        splits = _json(source / "dataset_dict.json").get("splits", [])
        return [file for split in splits for file in _saved(_inside(source, split), str(split))]
    if (source / "state.json").is_file():
        return _saved(source, None)
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else []
    if not files:
        raise DataError(
            "no data set of Hugging Face",
            where=str(source),
            fix="give a folder that datasets.save_to_disk wrote, a .parquet file, or a folder of such files",
        )
    return [TableFile(path, _split_of(path)) for path in files]


def _saved(folder: Path, split: str | None) -> list[TableFile]:
    names = [entry.get("filename") for entry in _json(folder / "state.json").get("_data_files", [])]
    if not names:
        raise DataError("the saved data set names no files", where=str(folder / "state.json"))
    return [TableFile(_inside(folder, name), split) for name in names]


def _inside(folder: Path, name: Any) -> Path:
    """Return the path of a file named in JSON: a direct child, or a downloaded dataset could name any file."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise DataError(f"not the name of a file in the folder: {name!r:.80}", where=str(folder))
    return folder / name


def _split_of(path: Path) -> str | None:
    """Return the split of a file: train for `train-00000-of-00004.parquet` and `train/0000.parquet`."""
    head = path.stem.partition("-")[0] if "-of-" in path.stem else path.parent.name
    return head if head in ("train", "test", "val", "validation", "dev") else None


def _image(value: Any, where: str) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        fix = "save it with its images embedded (save_to_disk and to_parquet do), or use `make manifest` for paths"
        raise DataError("the row holds no image", where=where, fix=fix)
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
            f"no key: {text!r:.80}", where=where, fix="keys have no dots and no slashes; choose another column"
        )
    return text


def _json(path: Path) -> dict[str, Any]:
    with reading(path, ValueError):
        value = read_json(path)
    if not isinstance(value, dict):
        raise DataError("not a JSON object", where=str(path))
    return value
