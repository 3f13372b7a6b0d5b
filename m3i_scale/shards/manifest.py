"""Table of paths, captions and labels as input of `make`."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_scale.errors import DataError, did_you_mean
from m3i_scale.shards.arrow import read_rows
from m3i_scale.shards.records import ListedInput, Record, reading, split_name


@dataclass(frozen=True)
class TableColumns:
    """Column names of a manifest. `path` must exist; other columns must exist if their names are not the defaults."""

    path: str = "path"
    caption: str = "caption"
    label: str = "label"
    split: str = "split"
    mask: str | None = None
    """Column of mask paths; read only if named."""


def manifest_input(
    manifest: Path,
    *,
    columns: TableColumns | None = None,
    root: Path | None = None,
    labels: Sequence[str] | None = None,
) -> ListedInput:
    """Open a CSV, TSV, Parquet or JSON-lines file that lists images; its suffix selects the format.

    Args:
        root: root of relative paths; default: the manifest's folder.
        labels: class names. Default: the sorted names in the table; for numbers, 0 … the largest.
    """
    columns = columns or TableColumns()
    rows = read_table(manifest)
    _check_columns(rows, columns, manifest)
    known = list(labels) if labels is not None else _labels_of(row.get(columns.label) for row in rows)
    numbers = {label: number for number, label in enumerate(known)}
    root = manifest.parent if root is None else root
    records = [_row_record(number, row, columns, root, numbers, manifest) for number, row in enumerate(rows)]
    return ListedInput(records, known, source="manifest")


def _row_record(
    number: int, row: dict[str, Any], columns: TableColumns, root: Path, numbers: dict[str, int], manifest: Path
) -> Record:
    where = f"{manifest}, row {number + 1}"
    split, name = split_name(row.get(columns.split), where), row.get(columns.path)
    if not name:
        return Record(
            f"{number:09d}",
            b"",
            split=split,
            problem=DataError("the row has no path", where=where, fix="add the path of the image"),
        )
    path, label, problem = root / str(name), None, None
    try:
        label = _label_number(row.get(columns.label), numbers, where)
    except DataError as error:
        problem = error
    caption, mask_name = row.get(columns.caption), row.get(columns.mask) if columns.mask else None
    mask = root / str(mask_name) if mask_name else None
    return Record(
        key=f"{number:09d}",
        image=path,
        caption=None if caption is None else str(caption).strip() or None,
        label=label,
        mask=mask,
        meta={"path": str(name)} | _further(row, columns),
        split=split,
        group=str(name),  # all captions of an image stay in the same split
        size=sum(file.stat().st_size for file in (path, mask) if file is not None and file.is_file()),
        problem=problem,
    )


def _further(row: dict[str, Any], columns: TableColumns) -> dict[str, Any]:
    """Return the columns without a role, such as `concept`, `family` and `group`, which `evaluate` reads."""
    known = {"path", *vars(columns).values()}
    return {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in row.items()
        if name not in known and value is not None
    }


def _label_number(value: Any, numbers: dict[str, int], where: str) -> int | None:
    if value is None or value == "":
        return None
    text = str(value)
    if text in numbers:
        return numbers[text]
    if _is_integer(text):
        if 0 <= int(text) < len(numbers):
            return int(text)
        raise DataError(
            f"the label must be from 0 to {len(numbers) - 1}, got {text}",
            where=where,
            fix="correct the row, or add the missing class names",
        )
    raise DataError(f"unknown label '{text}'", where=where, fix=did_you_mean(text, numbers))


def _labels_of(values: Iterable[Any]) -> list[str]:
    present = {str(value) for value in values if value is not None and value != ""}
    if present and all(_is_integer(value) for value in present):
        return [str(number) for number in range(max(map(int, present)) + 1)]
    return sorted(present)


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,9}", text) is not None


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV, TSV, Parquet or JSON-lines file; empty cells of CSV and TSV become None."""
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": read_rows, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"the name of a manifest must end in one of {', '.join(readers)}, got '{path.name}'",
            where=str(path),
            fix="convert or rename the file",
        )
    with reading(path, UnicodeDecodeError, csv.Error):
        rows = list(reader(path))
    if not rows:
        raise DataError("the manifest has no rows", where=str(path), fix="add one row per image")
    return rows


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream, delimiter=delimiter, restkey=""):
            if "" in row:
                first = next(iter(row.values()))
                raise DataError(
                    "a row has more cells than the header",
                    where=f"{path}, line {first!r}",
                    fix="quote values that contain the separator",
                )
            yield {name: value or None for name, value in row.items()}


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"the line must be JSON: {error}", where=f"{path}, line {number}", fix="correct the line"
                ) from None
            if not isinstance(row, dict):
                raise DataError(
                    "every line must be a JSON object", where=f"{path}, line {number}", fix="correct the line"
                )
            yield row


def _check_columns(rows: Sequence[dict[str, Any]], columns: TableColumns, manifest: Path) -> None:
    present = set().union(*(row.keys() for row in rows))
    default = TableColumns()
    for role in ("path", "caption", "label", "split", "mask"):
        name = getattr(columns, role)
        if name is not None and name not in present and (role == "path" or name != getattr(default, role)):
            raise DataError(
                f"the manifest has no column '{name}'", where=str(manifest), fix=did_you_mean(name, map(str, present))
            )
