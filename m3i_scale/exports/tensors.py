"""Tensors of an export: their sources in the checkpoint, validation of their values, and safetensors files.

Files are written shard by shard: memory contains one shard, never the full model.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel, Dinov2Config, PreTrainedModel, RfDetrPreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from m3i_scale.backbones.build import vision_class
from m3i_scale.backbones.families import VisionConfig, token_family
from m3i_scale.errors import ExportError
from m3i_scale.exports.fresh import fingerprint
from m3i_scale.files import write_json

Resize = Literal["center", "whole", "windows", "padded", "stretched"]
"""Image processors: center crop, full image resized to a square (whole, stretched) or padded, square windows along the
longer side."""
VISION, TEXT = "student.model.", "text.model."

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_SHARD_SIZE = "5GB"
_ZERO_AT_INIT = (
    ".dcn.offset.weight",
    ".dcn.mask.weight",
    ".dcn.center_feature_scale_proj_weight",
    ".rows",
    ".columns",
    ".sampling_offsets.weight",
    ".attention_weights.weight",
    "reference_point_embed.weight",
    ".layers.2.weight",  # of `bbox_embed`
)
"""Ends of the names of matrices that are zero in a new model (InternImage, Mask R-CNN, RF-DETR). Some settings do not
train them, e.g. one sampling point."""
_NOT_TRAINED = "training does not produce this: the tensor was not written, or is in the place of another one"
_OTHER = "export another checkpoint of the run"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", re.IGNORECASE)

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
    resize: Resize = "center"


def empty(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Build a model with empty weights."""
    try:
        with init_empty_weights(include_buffers=False):
            return build()
    except ImportError:
        raise ExportError(
            "timm is not installed; only timm has a model with the pooling of this recipe",
            fix="run `pip install -e '.[timm]'`",
        ) from None


def label_maps(names: Iterable[str]) -> dict[str, Any]:
    """Return class names as the fields of a configuration."""
    by_index = dict(enumerate(names))
    return {"id2label": by_index, "label2id": {name: index for index, name in by_index.items()}}


def copied(names: Iterable[str], source_prefix: str, target_prefix: str = "") -> dict[str, TensorSource]:
    """Return tensors that are copied unchanged from names with one prefix to names with another."""
    return {target_prefix + name: TensorSource((source_prefix + name,)) for name in names}


def backbone_tensors(config: VisionConfig, parts: Mapping[str, str], prefix: str = "") -> dict[str, TensorSource]:
    """Return the tensors of a backbone under the names in `parts`, with layer scales of 1 for a ViT. `parts`
    has keys of `TokenFamily.parts`; tensors of other parts are not exported."""
    width, ours, tensors = config.hidden_size, token_family(config).parts, {}
    for name in vision_names(config):
        part, number, suffix = _part_of(name, ours)
        if part in parts:
            tensors[prefix + parts[part].format(number) + suffix] = TensorSource((VISION + name,))
    if not isinstance(config, Dinov2Config):
        for layer in range(config.num_hidden_layers):
            for part in ("scale1", "scale2"):
                tensors[prefix + parts[part].format(layer)] = TensorSource((), lambda: torch.ones(width))
    return tensors


def _part_of(name: str, ours: Mapping[str, str]) -> tuple[str, str, str]:
    """Split a name: `layers.3.mlp.fc1.weight` → fc1, 3, .weight."""
    for part, pattern in ours.items():
        stem = re.escape(pattern).replace(r"\{\}", r"(?P<number>\d+)")
        found = re.fullmatch(rf"{stem}(?P<suffix>\.weight|\.bias)?", name)
        if found is not None:
            return part, found.groupdict().get("number", ""), found["suffix"] or ""
    raise ExportError(
        f"the export has no converter for '{name}', a part of the backbone",
        where=name,
        fix="use --task features, and report it as a bug",
    )


def vision_names(config: VisionConfig) -> list[str]:
    """Return the names of a backbone's tensors."""
    kind, options = vision_class(config)
    return list(empty(lambda: kind(config, **options)).state_dict())


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
            f"the checkpoint does not fill a {type(part.model).__name__}: {len(missing)} tensors are missing and "
            f"{len(unknown)} are unknown, e.g. '{[*missing, *unknown][0]}'",
            fix="use the version of this package that saved the checkpoint, or another checkpoint",
        )


def _check_shape(part: ExportedModule, name: str, tensor: Tensor) -> None:
    """Check that a tensor has the shape that the model expects."""
    wanted = part.model.state_dict()[name].shape
    if tensor.shape != wanted:
        raise ExportError(
            f"the checkpoint does not fill a {type(part.model).__name__}: '{name}' must be {list(wanted)}, got "
            f"{list(tensor.shape)}",
            fix="use the version of this package that saved the checkpoint, or another checkpoint",
        )


def _checked(name: str, weights: Mapping[str, Tensor]) -> Tensor:
    try:
        tensor = weights[name]
    except KeyError:
        raise ExportError(
            "the checkpoint does not fit its config file: a tensor is missing",
            where=name,
            fix="use another checkpoint of the run",
        ) from None
    if tensor.numel() == 0:
        raise ExportError(
            "a tensor has no elements",
            where=name,
            why="it was partitioned when it was read; the export would load as random weights",
            fix="use another checkpoint of the run",
        )
    if tensor.dtype != torch.float32:
        raise ExportError(
            f"a tensor must be float32, got {str(tensor.dtype).removeprefix('torch.')}",
            where=name,
            fix="use another checkpoint of the run",
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ExportError("a tensor has non-finite values", where=name, fix="export an earlier checkpoint of the run")
    return tensor


def _without_view(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor that is not a view: views of one buffer look like tied weights and are dropped."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def check_shard_size(size: str) -> None:
    """Validate a value of `--max-shard-size`."""
    match = _SIZE.fullmatch(size)
    if match is None or float(match[1]) <= 0:
        raise ExportError(
            f"--max-shard-size must be a file size, got '{size}'",
            where="--max-shard-size",
            fix="use a number and KB, MB, GB or TB, e.g. --max-shard-size 2GB",
        )


class Fingerprints(dict[str, str]):
    """Fingerprints of the tensors of a model by name."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor. Raise ExportError if a matrix has a single value or equals an earlier matrix."""
        digest = fingerprint(tensor)
        if sum(side > 1 for side in tensor.shape) > 1:
            first = tensor.reshape(-1)[0]
            constant = bool((tensor == first).all())
            if constant and not (first == 0 and name.endswith(_ZERO_AT_INIT)):
                raise ExportError(
                    f"all values of a matrix are {first.item():g}", where=name, why=_NOT_TRAINED, fix=_OTHER
                )
            same = None if constant else next((other for other, value in self.items() if value == digest), None)
            if same is not None:
                raise ExportError(
                    f"'{same}' and '{name}' have the same values", where=name, why=_NOT_TRAINED, fix=_OTHER
                )
        self[name] = digest


def write_part(
    folder: Path, part: ExportedModule, weights: Mapping[str, Tensor], dtype: torch.dtype, max_shard_size: str
) -> dict[str, str]:
    """Write config.json, safetensors (with an index if there are several files) and source files of one model into its
    subfolder of `folder`. Weights are read tensor by tensor. Return the fingerprint of every tensor by its name in the
    model, for comparison after loading."""
    place = folder / part.folder
    place.mkdir(exist_ok=True)
    check_complete(part)
    _write_config(place, part, dtype)
    fingerprints = Fingerprints()
    stored = _stored(part.model)
    names = {_file_name(part, key): key for key in stored}
    shapes = {name: stored[key][0] for name, key in names.items()}
    plan = split_torch_state_dict_into_shards(
        {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, keys in plan.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for key in keys:
            tensors: dict[str, Tensor] = {}
            for name in stored[names[key]][1]:
                tensors[name] = value_of(part.tensors[name], weights, dtype)
                _check_shape(part, name, tensors[name])
                fingerprints.add(name, tensors[name])
            if len(tensors) > 1:
                tensors = {key: revert_weight_conversion(part.model, tensors)[names[key]].contiguous()}
            (shard[key],) = tensors.values()
        save_file(shard, place / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(place / "model.safetensors.index.json", index)
    for path in part.files:
        shutil.copyfile(path, place / path.name)
    return fingerprints


def _write_config(place: Path, part: ExportedModule, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if part.config is not None:
        write_json(place / "config.json", part.config | {"dtype": name})
        return
    config = part.model.config
    config.dtype, config.architectures = name, [type(part.model).__name__]
    config.save_pretrained(place)


def _stored(model: PreTrainedModel) -> dict[str, tuple[torch.Size, tuple[str, ...]]]:
    """Return the shape and the model's tensor names for each name in the file.

    `transformers` saves with the names and packing of the published files, so every version can load the folder.
    """
    state = dict(model.state_dict())
    name_of = {id(tensor): name for name, tensor in state.items()}
    # RF-DETR also loads by the model's names; the published names pack tensors that are not siblings.
    reverted = state if isinstance(model, RfDetrPreTrainedModel) else revert_weight_conversion(model, state)
    alone = {name_of[id(tensor)] for tensor in reverted.values() if id(tensor) in name_of}
    stored: dict[str, tuple[torch.Size, tuple[str, ...]]] = {}
    for key, tensor in reverted.items():
        if id(tensor) in name_of:
            stored[key] = (tensor.shape, (name_of[id(tensor)],))
            continue
        # Packed from several siblings with the same suffix: `mlp.gate_proj.weight`, … in `mlp.weights_in.weight`.
        stem, _, kind = key.rpartition(".")
        beside = stem.rpartition(".")[0] + "."
        packed = (name for name in state if name not in alone and name.startswith(beside) and name.endswith(f".{kind}"))
        stored[key] = (tensor.shape, tuple(packed))
    return stored


def _file_name(part: ExportedModule, key: str) -> str:
    """Return the name in the file. CLIP's towers are one level deeper in the file unless they are parts of a CLIPModel:
    every version of `transformers` can read that, and versions before 5 require it."""
    for name, one in () if isinstance(part.model, CLIPModel) else part.model.named_modules():
        tower = f"{name}." if name else ""
        if isinstance(one, CLIPVisionModel | CLIPTextModel) and key.startswith(tower):
            kind = "vision" if isinstance(one, CLIPVisionModel) else "text"
            return f"{tower}{kind}_model.{key.removeprefix(tower)}"
    return key.removeprefix(part.strip)
