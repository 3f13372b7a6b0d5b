"""Features of a dataset split on disk, reused for the same weights, data and preprocessing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from m3i_scale import __version__
from m3i_scale.errors import ConfigError
from m3i_scale.evaluation.dense import Patches
from m3i_scale.evaluation.measures import Side
from m3i_scale.evaluation.samples import Table, table_indices
from m3i_scale.files import replacing, sha256_of, sha256_of_json

PATCHES = "patches"
_VERSIONS = [__version__, torch.__version__, transformers.__version__]
_NOT_WEIGHTS = ("README.md", "export.json")
"""Files of an export that may change while its features do not."""
_OF_SAMPLES = ("keys", "places", "captions", "labels", "meta", "groups", "left_out", "bad_masks")
"""Fields of a table that reading fills."""


class FeatureCache:
    """Folder of features. The name of a file is a hash of everything that its features depend on.

    Args:
        folder: created if it does not exist.
        model: the model folder.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        files = sorted(path for path in model.rglob("*") if path.is_file() and path.name not in _NOT_WEIGHTS)
        self._model = [[path.relative_to(model).as_posix(), sha256_of(path)] for path in files]
        self._folder = folder

    def get(self, table: Table, needed: set[str], settings: dict[str, Any], read: Callable[[], Side]) -> Side:
        """Return the features of all samples and fill the empty table: from a file, or by `read`, and save them.

        Args:
            needed: names of the encoders, and `PATCHES` if patches are requested. A file may have more.
            settings: what the features depend on besides model and data.
        """
        key = sha256_of_json([_VERSIONS, self._model, _contents(table), settings])
        path = self._folder / f"{key}.pt"
        saved = _load(path) if path.is_file() else None
        if saved is None or not needed <= set(saved["contents"]):
            side = read()
            _save(path, side, needed)
            return side
        for name in _OF_SAMPLES:
            setattr(table, name, saved["table"][name])
        if PATCHES not in needed:
            table.bad_masks.clear()
            return Side(table, saved["features"])
        patches = None if saved["patches"] is None else Patches(**saved["patches"])
        return Side(table, saved["features"], patches, saved["no_patches"])


def _contents(table: Table) -> list[Any]:
    """Return what identifies the samples of a table in any folder: class names, and name, size, digest of the headers
    and version of every shard."""
    table.indices = table_indices(table)
    shards = []
    for index in table.indices:
        version = str(index.path.stat().st_mtime_ns) if isinstance(index.path, Path) else index.version
        shards.append([index.path.name, index.size, index.digest, version])
    return [table.classes, shards]


def _save(path: Path, side: Side, contents: set[str]) -> None:
    saved = {
        "contents": sorted(contents),
        "table": {name: getattr(side.table, name) for name in _OF_SAMPLES},
        "features": side.features,
        "patches": None if side.patches is None else vars(side.patches),
        "no_patches": side.no_patches,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=False) as file:
            torch.save(_converted(saved, np.ndarray, torch.from_numpy), file)
    except OSError as error:
        raise ConfigError(
            f"the features cannot be saved: {error.strerror}",
            where=f"--cache-dir {path.parent}",
            fix="free some space, or use another folder",
        ) from None


def _load(path: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = _converted(torch.load(path, weights_only=True), Tensor, Tensor.numpy)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"the saved features cannot be read: {error}", where=str(path), fix="remove the file; it is written again"
        ) from None
    return saved


def _converted(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """Convert the values of one type in nested dictionaries."""
    if type(value) is dict:
        return {key: _converted(item, kind, convert) for key, item in value.items()}
    return convert(value) if isinstance(value, kind) else value
