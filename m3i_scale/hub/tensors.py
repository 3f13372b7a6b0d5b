"""Make the tensors of an export: which of the checkpoint's each is made of, and what none of them may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from m3i_scale.errors import ExportError
from m3i_scale.hub import fresh

Resize = Literal["centre", "whole", "windows", "padded", "stretched"]
VISION, TEXT = "student.model.", "text.model."

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TensorSource:
    """Says what one tensor of an export is made of."""

    sources: tuple[str, ...]
    """Names in the checkpoint."""
    make: Callable[..., Tensor] | None = None
    """Of the fp32 sources; None: the one source as it is. Without sources it makes a constant."""


@dataclass(frozen=True)
class ExportedModule:
    """Holds one model of an export, and how it is proven."""

    name: str
    """vision, tokens (as timm gives them), text, classifier, segmenter, detector, backbone, zero_shot."""
    model: PreTrainedModel
    """Without values: names, shapes, configuration."""
    tensors: dict[str, TensorSource]
    """By the name in `model`."""
    folder: str = ""
    """Below the export's."""
    auto: str = "AutoModel"
    """The class of `transformers` that loads it."""
    options: dict[str, Any] = field(default_factory=dict)
    """What `from_pretrained` is given so that nothing is added that nobody trained."""
    inputs: tuple[str, ...] = ("pixel_values",)
    output: str = "last_hidden_state"
    """What is compared with the training modules."""
    also: tuple[str, ...] = ()
    """What else of its outputs is."""
    native: str | None = None
    """timm or open_clip: the library whose format the folder has too, and which is compared as well."""
    strip: str = ""
    """What names in the file do without."""
    label_set: int = 0
    """Number of a classifier's label set."""
    config: dict[str, Any] | None = None
    """config.json, where the model's own configuration does not say it."""
    files: tuple[Path, ...] = ()
    """Source files that travel along."""

    @property
    def resize(self) -> Resize:
        """Return what of an image the model is shown: its centre square; all of it resized to the square; of a model
        that gives masks of queries squares along its longer side; of a detector all of it, in a square that is filled
        up or resized to the square."""
        if self.name == "detector":
            return "stretched" if self.output == "logits" else "padded"
        if self.name != "segmenter":
            return "centre"
        return "whole" if self.output == "logits" else "windows"


def copied(names: Iterable[str], source_prefix: str, target_prefix: str = "") -> dict[str, TensorSource]:
    """Return tensors that are taken over as they are.

    Args:
        names: in the model that was trained.
        source_prefix: before them in the checkpoint.
        target_prefix: before them in the export's model.
    """
    return {target_prefix + name: TensorSource((source_prefix + name,)) for name in names}


def value_of(name: str, made: TensorSource, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Make one tensor of an export, in storage of its own.

    Args:
        name: in the export, for messages.
        made: how it is made.
        weights: of the checkpoint; only what is needed is read.
        dtype: of the result. Sources are rounded to it before anything is made of them.
    """
    sources = [_checked(source, weights).to(dtype) for source in made.sources]
    if made.make is None:
        return _own_storage(sources[0])
    value = made.make(*[source.float() for source in sources])
    return _own_storage(value.to(dtype) if value.is_floating_point() else value)


def values_of(
    tensors: Mapping[str, TensorSource], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors, one at a time."""
    for name, made in tensors.items():
        yield name, value_of(name, made, weights, dtype)


def check_complete(part: ExportedModule) -> None:
    """Check that every tensor of the model is made, and nothing else."""
    wanted = part.model.state_dict().keys()
    missing, unknown = sorted(wanted - part.tensors.keys()), sorted(part.tensors.keys() - wanted)
    if missing or unknown:
        raise ExportError(
            f"the checkpoint does not fill a {type(part.model).__name__}: {len(missing)} tensors would be missing and"
            f" {len(unknown)} have no place, e.g. '{[*missing, *unknown][0]}'",
        )


def check_shape(part: ExportedModule, name: str, tensor: Tensor) -> None:
    """Check that a tensor has the shape that the model gives it."""
    wanted = part.model.state_dict()[name].shape
    if tensor.shape != wanted:
        raise ExportError(
            f"the checkpoint does not fill a {type(part.model).__name__}: '{name}' is {list(tensor.shape)} and must be"
            f" {list(wanted)}"
        )


class Distinct:
    """Refuses two matrices of one model with the same values: where both were trained, they cannot be equal, so one
    has been written in the other's place."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def __call__(self, name: str, tensor: Tensor) -> str:
        """Return the tensor's fingerprint."""
        digest = fresh.fingerprint(tensor)
        if sum(side > 1 for side in tensor.shape) > 1 and not bool((tensor == tensor.reshape(-1)[0]).all()):
            first = self._seen.setdefault(digest, name)
            if first != name:
                raise ExportError(
                    f"'{first}' and '{name}' hold the same values",
                    where=name,
                    why="they share one tensor, and the model has two",
                    fix="take another checkpoint of the run",
                )
        return digest


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


def _own_storage(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor, no view of a larger buffer: views of one look like tied weights, and are dropped."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
