"""Files of extracted features: Parquet, written block by block, and NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from m3i_scale.errors import ConfigError

ROW_GROUP = 4_096
"""Minimum number of rows in a row group of Parquet, except for the last one; limits the memory."""


@dataclass
class FeatureBlock:
    """Features of consecutive images."""

    keys: list[str]
    labels: list[int]
    """Class indices, −1 without one."""
    features_BD: NDArray[np.float32]


def check_features_file(path: Path) -> None:
    """Check that features can be written to a path."""
    if path.suffix not in WRITERS or path.is_dir():
        raise ConfigError(
            f"the output must be a file that ends in {' or '.join(WRITERS)}, got '{path.name}'",
            where="--output",
            fix="--output features.parquet",
        )
    if not path.parent.is_dir():
        raise ConfigError("the folder of the output is missing", where=str(path.parent), fix=f"mkdir -p {path.parent}")


def joined(blocks: Iterable[FeatureBlock]) -> dict[str, NDArray[Any]]:
    """Return `features` (N, D), `keys` (N) and `labels` (N), −1 without one."""
    every = list(blocks)
    return {
        "features": np.concatenate([block.features_BD for block in every]),
        "keys": np.asarray([key for block in every for key in block.keys], dtype=np.str_),
        "labels": np.asarray([label for block in every for label in block.labels], dtype=np.int64),
    }


def write_npz(file: BinaryIO, blocks: Iterable[FeatureBlock], metadata: Mapping[str, Any]) -> None:
    """Write the arrays of `joined`, and `metadata` as JSON. Holds all features in memory."""
    arrays: dict[str, Any] = {"metadata": np.asarray(json.dumps(metadata)), **joined(blocks)}
    np.savez(file, **arrays)


def write_parquet(file: BinaryIO, blocks: Iterable[FeatureBlock], metadata: Mapping[str, Any]) -> None:
    """Write the columns `key`, `label` (if the data have classes) and `features`, and the metadata of the schema."""
    columns = {"key": pa.string(), "label": pa.int64(), "features": pa.list_(pa.float32())}
    if not metadata["classes"]:
        del columns["label"]
    facts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    schema = pa.schema(columns.items()).with_metadata(facts)
    with pq.ParquetWriter(file, schema) as writer:
        for block in _row_groups(blocks):
            count, width = block.features_BD.shape
            values = {
                "key": pa.array(block.keys, pa.string()),
                "label": pa.array([None if label < 0 else label for label in block.labels], pa.int64()),
                "features": pa.ListArray.from_arrays(
                    pa.array(np.arange(count + 1, dtype=np.int32) * width), pa.array(block.features_BD.reshape(-1))
                ),
            }
            writer.write_table(pa.table([values[name] for name in columns], schema=schema))


def _row_groups(blocks: Iterable[FeatureBlock]) -> Iterator[FeatureBlock]:
    waiting: list[FeatureBlock] = []
    for block in blocks:
        waiting.append(block)
        if sum(len(part.keys) for part in waiting) >= ROW_GROUP:
            yield _merged(waiting)
            waiting = []
    if waiting:
        yield _merged(waiting)


def _merged(blocks: list[FeatureBlock]) -> FeatureBlock:
    return FeatureBlock(
        [key for block in blocks for key in block.keys],
        [label for block in blocks for label in block.labels],
        np.concatenate([block.features_BD for block in blocks]),
    )


WRITERS: dict[str, Callable[[BinaryIO, Iterable[FeatureBlock], Mapping[str, Any]], None]] = {
    ".parquet": write_parquet,
    ".npz": write_npz,
}
"""By the extension of the file."""
