"""Read weight files: names and shapes from headers, then single tensors or parts of tensors."""

from __future__ import annotations

import contextlib
import pickle
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import safe_globals

from m3i_scale.errors import ConfigError
from m3i_scale.files import read_json

NAMES = {
    "transformers": ("model.safetensors", "pytorch_model.bin"),
    "timm": ("model.safetensors", "pytorch_model.bin"),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
"""Weight file names by format, in order of preference; each may be sharded."""
_WRAPPERS = ("state_dict", "model", "module")
_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError)
_REFUSED_CODE = "Weights only load failed"  # beginning of torch's message, which then recommends `weights_only=False`


class _Safetensors:
    """An open `.safetensors` file."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor without reading values."""
        names = self._file.keys()
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in names}

    def read(self, name: str, part: int, parts: int) -> Tensor:
        """Return part number `part` of `parts` equal parts along the first dimension."""
        if parts == 1:
            whole: Tensor = self._file.get_tensor(name)
            return whole
        rows = self._file.get_slice(name)
        step = rows.get_shape()[0] // parts
        some: Tensor = rows[part * step : (part + 1) * step]
        return some


class _Pickled:
    """A memory-mapped `torch.save` file with a dictionary of tensors; methods as in `_Safetensors`."""

    def __init__(self, path: Path) -> None:
        with safe_globals([Namespace]):  # options of the script that wrote the file, which are only attributes
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        while isinstance(content, dict) and (key := next((key for key in _WRAPPERS if _holds(content.get(key))), None)):
            content = content[key]
        if not _holds(content):
            raise ValueError("it holds no dictionary of tensors")
        self._tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._tensors.items()}

    def read(self, name: str, part: int, parts: int) -> Tensor:
        return self._tensors[name].chunk(parts)[part]


def _holds(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(item, Tensor | dict) for item in value.values())


@contextlib.contextmanager
def open_weights(path: Path, where: str) -> Iterator[_Safetensors | _Pickled]:
    """Open a `.safetensors` file, or a `.pth`, `.pt` or `.bin` file with only tensors."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                yield _Safetensors(file)
        else:
            yield _Pickled(path)
    except _UNREADABLE as error:
        raise ConfigError(
            f"cannot read weights: {_reason(error)}",
            where=f"{where}: {path}",
            why="files must be safetensors, or made by `torch.save` (since torch 1.6) with tensors only",
            fix="copy or download it again, or save the state dict as safetensors",
        ) from None


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if not text.startswith(_REFUSED_CODE):
        return text.splitlines()[0]
    refused = re.search(r"GLOBAL (\w[\w.]*)", text)
    return f"there is more in it than tensors: {refused[1]}" if refused else "it is torn, or holds more than tensors"


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file does not exist."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read a configuration: {error}", where=str(path), fix="copy or download the file again"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            "the configuration must be a JSON object", where=str(path), fix="copy or download the file again"
        )
    return values


def weight_files(place: Path, kind: str, where: str) -> list[Path]:
    """Return the weight files of a folder, or the file itself."""
    if place.is_file():
        return [place]
    for name in NAMES[kind]:
        if (place / name).is_file():
            return [place / name]
        index = place / f"{name}.index.json"
        if index.is_file():
            return _shards(index, where)
    raise ConfigError(
        f"no weights in '{place}'",
        where=where,
        fix=f"use a folder with {' or '.join(NAMES[kind])}, in one file or in shards",
    )


def _shards(index: Path, where: str) -> list[Path]:
    try:
        shards = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"cannot read the index of shards: {error}",
            where=f"{where}: {index}",
            fix="copy or download the file again",
        ) from None
    for shard in shards:
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise ConfigError(
                f"the shard '{shard}' of the index is missing",
                where=f"{where}: {index}",
                fix="copy or download all shards of the model into this folder",
            )
    return [index.parent / shard for shard in shards]


def read_headers(paths: list[Path], where: str) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Return file and shape by tensor name."""
    place_of: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in paths:
        with open_weights(path, where) as weights:
            for name, shape in weights.shapes().items():
                if name in place_of:
                    raise ConfigError(
                        f"'{name}' occurs in two files",
                        where=f"{where}: {place_of[name][0]}, {path}",
                        fix="remove the file that is not part of the model",
                    )
                place_of[name] = path, shape
    return place_of
