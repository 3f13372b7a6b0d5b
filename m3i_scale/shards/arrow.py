"""Reader of Arrow and Parquet files that detects the image, caption and label columns.

A column is detected by its type, or by its name if several are candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from m3i_scale.errors import ConfigError, DataError, did_you_mean
from m3i_scale.shards.records import reading

NONE = "none"
"""Column name that selects no column."""
BATCH_ROWS = 64
_parquet_file: Any = pyarrow.parquet.ParquetFile


@dataclass(frozen=True)
class Columns:
    """Column names given by the user; None: detected by type."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    key: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Roles:
    """Names of the columns in use, by role."""

    image: str
    caption: str | None
    label: str | None
    key: str | None
    group: str | None

    def used(self) -> set[str | None]:
        """Return the columns that are not copied to the JSON file of a sample."""
        return {self.image, self.caption, self.label}


def find_roles(schema: Any, columns: Columns, where: str) -> tuple[Roles, list[str]]:
    """Detect the roles of columns, and the class names of the label column.

    The image is the only column of type Image (or of a struct with bytes and path). The label is the only ClassLabel.
    The caption is the only existing column of `caption`, `text`, `captions` and `texts`.
    """
    names = list(schema.names)
    for name in vars(columns).values():
        if name is not None and name != NONE and name not in names:
            raise ConfigError(f"there is no column '{name}'", where=where, fix=did_you_mean(name, names))
    features = _features(schema, where)
    images = [name for name in names if _is_image(features.get(name), schema.field(name).type)]
    labels = [name for name in names if _kind(features.get(name)) == "ClassLabel"]
    texts = [name for name in names if name in ("caption", "text", "captions", "texts")]
    image = _one("image", columns.image, images, where)
    if image is None:
        raise ConfigError("there is no column of images", where=where, fix="name it with --image-column")
    label = _one("label", columns.label, labels, where)
    roles = Roles(image, _one("caption", columns.caption, texts, where), label, columns.key, columns.group)
    return roles, _class_names(features.get(label or ""), label, where)


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file as dicts by column name, with few rows in memory.

    Args:
        path: a .parquet file, or an Arrow stream otherwise.
        columns: columns to read; None: all.
    """
    with _reading(path):
        if path.is_dir():  # Spark and dask write a table as a folder
            for part in sorted(path.glob("*.parquet")):
                yield from read_rows(part, columns)
        elif columns == []:
            yield from ({} for _ in range(row_count(path)))
        elif _is_parquet(path):
            with _parquet_file(path) as table:
                for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                    yield from batch.to_pylist()
        else:
            with pyarrow.memory_map(str(path)) as memory, pyarrow.ipc.open_stream(memory) as stream:
                for batch in stream:
                    picked = batch if columns is None else batch.select(columns)
                    for start in range(0, picked.num_rows, BATCH_ROWS):
                        yield from picked.slice(start, BATCH_ROWS).to_pylist()


def row_count(path: Path) -> int:
    """Return the number of rows of a file from its headers."""
    with _reading(path):
        if _is_parquet(path):
            with _parquet_file(path) as table:
                return int(table.metadata.num_rows)
        with pyarrow.memory_map(str(path)) as memory, pyarrow.ipc.open_stream(memory) as stream:
            return sum(int(batch.num_rows) for batch in stream)


def schema_of(path: Path) -> Any:
    """Return the Arrow schema of a file, with the metadata of `datasets`."""
    with _reading(path):
        if _is_parquet(path):
            with _parquet_file(path) as table:
                return table.schema_arrow
        with pyarrow.memory_map(str(path)) as memory, pyarrow.ipc.open_stream(memory) as stream:
            return stream.schema


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _reading(path: Path) -> AbstractContextManager[None]:
    return reading(path, pyarrow.ArrowException, fix="download it again")


def python_value(value: Any) -> Any:
    """Convert a cell to JSON types.

    Raises:
        TypeError: the value has no JSON type.
    """
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
    """Return the column features from the metadata of `datasets`."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the description of the columns is damaged: {error!r}", where=where) from None
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
