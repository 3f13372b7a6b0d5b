"""Features of a dataset split on disk, reused for the same weights, data and preprocessing."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import transformers
from torch import Tensor

from m3i_scale.errors import ConfigError
from m3i_scale.evaluation.dense import Patches
from m3i_scale.evaluation.measures import Side
from m3i_scale.evaluation.samples import Table, table_indices
from m3i_scale.files import replacing, sha256_of, sha256_of_json

PATCHES = "patches"
"""Stands for the patches of all encoders among the features that are requested."""
_NOT_WEIGHTS = ("README.md", "export.json")
"""Files of an export that may change while its features do not."""
PACKAGE = Path(__file__).parents[1]
_LIBRARIES = (PIL, timm, torch, transformers)
_OF_SAMPLES = ("keys", "places", "captions", "labels", "meta", "groups", "left_out", "bad_masks")
"""Fields of a table that reading fills."""


class FeatureCache:
    """Folder of features. The name of a file is a hash of the model, the data, the settings, and the code of this
    package and of its libraries. It does not include classes of the user (`--import`).

    Args:
        folder: created if it does not exist.
        model: the model folder.

    Raises:
        ConfigError: the folder is in the model folder, or cannot be written.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        if folder.resolve().is_relative_to(model.resolve()):
            raise ConfigError(
                "the folder must not be in the model folder", where=f"--cache-dir {folder}", fix="use another folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(
                f"the features cannot be saved: {error.strerror}",
                where=f"--cache-dir {folder}",
                fix="use another folder, or free some space",
            ) from None
        self._versions = [library.__version__ for library in _LIBRARIES] + _hashes(PACKAGE, only=".py")
        self._model = _hashes(model)
        self._folder = folder

    def get(self, table: Table, needed: set[str], settings: dict[str, Any], read: Callable[[], Side]) -> Side:
        """Return the features of all samples and fill the empty table: from a file, or by `read`, and save them.

        Args:
            needed: names of the encoders, and `PATCHES` if patches are requested. A file may have more.
            settings: what the features depend on besides model and data.
        """
        key = sha256_of_json([self._versions, self._model, _contents(table), settings])
        path = self._folder / f"{key}.pt"
        saved = _load(path) if path.is_file() else None
        if saved is None or not needed <= set(saved["contents"]):
            del saved  # frees its memory
            side = read()
            side.not_saved = _save(path, side, needed)
            return side
        features = {name: saved["features"][name] for name in needed - {PATCHES}}
        for name in _OF_SAMPLES:
            setattr(table, name, saved["table"][name])
        if PATCHES not in needed:
            table.bad_masks.clear()
            return Side(table, features)
        patches = None if saved["patches"] is None else Patches(**saved["patches"])
        return Side(table, features, patches, saved["no_patches"])


def _hashes(folder: Path, only: str = "") -> list[list[str]]:
    """Return name and SHA-256 of all files below a folder whose names end in `only`. Links are followed."""
    walked = os.walk(folder, followlinks=True)
    files = sorted(Path(place, name) for place, _, names in walked for name in names if name.endswith(only))
    return [
        [file.relative_to(folder).as_posix(), sha256_of(file)]
        for file in files
        if file.is_file() and file.name not in _NOT_WEIGHTS
    ]


def _contents(table: Table) -> list[Any]:
    """Return the identity of the samples of a table, independent of their folder: class names, and name, size, digest
    of the headers and version of every shard."""
    table.indices = table_indices(table)
    shards = []
    for index in table.indices:
        version = str(index.path.stat().st_mtime_ns) if isinstance(index.path, Path) else index.version
        shards.append([index.path.name, index.size, index.digest, version])
    return [table.classes, shards]


def _save(path: Path, side: Side, contents: set[str]) -> str | None:
    """Save features. Return a warning if they cannot be written. The evaluation continues, because it may have taken
    hours to compute them."""
    saved = {
        "contents": sorted(contents),
        "table": {name: getattr(side.table, name) for name in _OF_SAMPLES},
        "features": side.features,
        "patches": None if side.patches is None else vars(side.patches),
        "no_patches": side.no_patches,
    }
    try:
        with replacing(path) as file:
            torch.save(_converted(saved, np.ndarray, torch.from_numpy), file)
    except (OSError, RuntimeError) as error:
        # After a failed write, torch raises a RuntimeError while it closes the file.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        return f"--cache-dir {path.parent}: the features are not saved: {cause.strerror or cause}"
    return None


def _load(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        loaded = torch.load(str(path), weights_only=True, mmap=True)  # reads only the features that are requested
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"the saved features cannot be read: {reason}", where=str(path), fix="remove the file; it is written again"
        ) from None
    saved: dict[str, Any] = _converted(loaded, Tensor, Tensor.numpy)
    return saved


def _converted(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """Convert the values of one type in nested dictionaries."""
    if type(value) is dict:
        return {key: _converted(item, kind, convert) for key, item in value.items()}
    return convert(value) if isinstance(value, kind) else value
