"""Tensors of an export: their sources in the checkpoint, and validation of their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from m3i_scale.errors import ExportError

Resize = Literal["centre", "whole", "windows", "padded", "stretched"]
"""Image processors: center crop, full image resized to a square (whole, stretched) or padded, square windows along the
longer side."""
VISION, TEXT = "student.model.", "text.model."

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Trained = Callable[..., Mapping[str, Tensor]]
"""Outputs by name, as training computes them, from the objective and the part's `inputs` in their order; pixels are
normalized."""


@dataclass(frozen=True)
class TensorSource:
    """Source of one exported tensor."""

    sources: tuple[str, ...]
    """Names in the checkpoint."""
    make: Callable[..., Tensor] | None = None
    """Function of the fp32 sources. None: copy the single source. Without sources, it creates a constant."""


@dataclass(frozen=True)
class ExportedModule:
    """One model of an export, with the inputs and outputs for its verification."""

    name: str
    """vision, tokens (as in timm), text, classifier, segmenter, detector, backbone, zero_shot."""
    model: PreTrainedModel
    """Empty weights: names, shapes and configuration only."""
    tensors: dict[str, TensorSource]
    """By the name in `model`."""
    trained: Trained
    folder: str = ""
    """Subfolder of the export."""
    auto: str = "AutoModel"
    """The class of `transformers` that loads it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of `from_pretrained` that prevent untrained layers from being added."""
    inputs: tuple[str, ...] = ("pixel_values",)
    output: str = "last_hidden_state"
    """Output to compare with the training modules."""
    also: tuple[str, ...] = ()
    """Additional outputs to compare."""
    native: str | None = None
    """timm: library with native support for the folder's format, which is compared as well."""
    strip: str = ""
    """Prefix that is removed from names in the file."""
    config: dict[str, Any] | None = None
    """config.json, if it differs from the model's configuration."""
    files: tuple[Path, ...] = ()
    """Source files to include."""
    resize: Resize = "centre"


def empty(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Build a model with empty weights."""
    try:
        with init_empty_weights(include_buffers=False):
            return build()
    except ImportError:
        raise ExportError(
            "timm is not installed, and only it has a model that pools as the recipe does",
            fix="pip install 'm3i-scale[timm]'",
        ) from None


def label_maps(names: Iterable[str]) -> dict[str, Any]:
    """Return class names as the fields of a configuration."""
    by_index = dict(enumerate(names))
    return {"id2label": by_index, "label2id": {name: index for index, name in by_index.items()}}


def copied(names: Iterable[str], source_prefix: str, target_prefix: str = "") -> dict[str, TensorSource]:
    """Return tensors that are copied unchanged from names with one prefix to names with another."""
    return {target_prefix + name: TensorSource((source_prefix + name,)) for name in names}


def value_of(made: TensorSource, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Create one tensor of an export, with separate storage. Only the required weights are read; they are rounded to
    `dtype` before any computation."""
    sources = [_checked(source, weights).to(dtype) for source in made.sources]
    if made.make is None:
        return _without_view(sources[0])
    value = made.make(*[source.float() for source in sources])
    return _without_view(value.to(dtype) if value.is_floating_point() else value)


def check_complete(part: ExportedModule) -> None:
    """Check that there is a source for every tensor of the model, and no unknown name."""
    wanted = part.model.state_dict().keys()
    missing, unknown = sorted(wanted - part.tensors.keys()), sorted(part.tensors.keys() - wanted)
    if missing or unknown:
        raise ExportError(
            f"the checkpoint does not fill a {type(part.model).__name__}: {len(missing)} tensors would be missing and"
            f" {len(unknown)} have no place, e.g. '{[*missing, *unknown][0]}'",
        )


def check_shape(part: ExportedModule, name: str, tensor: Tensor) -> None:
    """Check that a tensor has the shape that the model expects."""
    wanted = part.model.state_dict()[name].shape
    if tensor.shape != wanted:
        raise ExportError(
            f"the checkpoint does not fill a {type(part.model).__name__}: '{name}' is {list(tensor.shape)} and must be"
            f" {list(wanted)}"
        )


def _checked(name: str, weights: Mapping[str, Tensor]) -> Tensor:
    try:
        tensor = weights[name]
    except KeyError:
        raise ExportError(
            "the checkpoint does not fit its own run file: a tensor is missing", where=name, fix="take another one"
        ) from None
    if tensor.numel() == 0:
        raise ExportError(
            "a tensor has no elements",
            where=name,
            why="it was still partitioned when it was read; the export would load as random weights",
        )
    if tensor.dtype != torch.float32:
        raise ExportError(f"a tensor is {str(tensor.dtype).removeprefix('torch.')}, and not float32", where=name)
    if not bool(torch.isfinite(tensor).all()):
        raise ExportError(
            "a tensor has values that are not finite", where=name, fix="export an earlier checkpoint of the run"
        )
    return tensor


def _without_view(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor that is not a view: views of one buffer look like tied weights and are dropped."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
