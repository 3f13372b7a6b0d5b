"""Frozen vision models: loading, pooling and features of images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PreTrainedModel,
    TimmWrapperImageProcessor,
    TimmWrapperModel,
)

from m3i_scale.backbones.families import TokenFamily, find_family
from m3i_scale.data.augment import CenterCrop
from m3i_scale.errors import ExportError
from m3i_scale.evaluation.processors import processed, transforms_of
from m3i_scale.files import read_json
from m3i_scale.objective.inputs import PixelNorm
from m3i_scale.output import quiet_loading

Pool = Literal["mean", "cls", "both"]
Encoder = Callable[[Tensor], Tensor]
"""uint8 images (B, 3, H, W) → features (B, D)."""

PIXEL_SIDE = 32
"""Image size of the raw-pixel baseline."""


@dataclass
class VisionModel:
    """Standard vision model with the transforms of its image processor."""

    model: Any
    processor: Any
    crop: CenterCrop
    """Transform from an image to pixels of the input size, before normalization."""
    pool: Pool
    pixel_norm: PixelNorm | None = None
    """Module with the same result as the processor for images of the right size; None: there is none."""

    @property
    def size(self) -> int:
        """Return the input size in pixels."""
        return self.crop.size

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        first: nn.Parameter = next(self.model.parameters())
        return first.device

    def encode(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features (B, D) and patch features (B, L, D), fp32, of uint8 (B, 3, H, W) at `size`."""
        hidden, patches = self.hidden(images_BCHW), self.patch_count()
        return pool_tokens(hidden, patches, self.pool), patch_tokens(hidden, patches)

    def pixels(self, images_BCHW: Tensor) -> Tensor:
        """Return the model input, on the model's device, for uint8 (B, 3, H, W) at `size`."""
        if self.pixel_norm is not None:
            normalized_BCHW: Tensor = self.pixel_norm(images_BCHW.to(self.device))
            return normalized_BCHW
        return processed(self.processor, images_BCHW.cpu()).to(self.device)

    def hidden(self, images_BCHW: Tensor) -> Tensor:
        """Return the last hidden state of uint8 (B, 3, H, W) at `size`; see `pool_tokens`."""
        hidden: Tensor = self.model(pixel_values=self.pixels(images_BCHW)).last_hidden_state
        return last_norm(self.model, hidden)

    def patch_count(self) -> int | None:
        """Return the number of patch tokens; None if the model has no plain grid."""
        if isinstance(self.model, TimmWrapperModel):
            patches: int | None = getattr(getattr(self.model.timm_model, "patch_embed", None), "num_patches", None)
            return patches
        patch = getattr(self.model.config, "patch_size", None)
        return (self.size // patch) ** 2 if isinstance(patch, int) else None


def last_norm(model: PreTrainedModel, hidden_BLD: Tensor) -> Tensor:
    """Return the hidden state after the final norm. CLIP's last hidden state precedes its final norm."""
    family = find_family(model.config)
    if isinstance(family, TokenFamily) and not family.norm_is_last:
        return family.normed(model, hidden_BLD)
    return hidden_BLD


def pool_tokens(hidden: Tensor, patches: int | None, pool: Pool) -> Tensor:
    """Pool the last hidden state of a model to one vector per image.

    Args:
        hidden: (B, L, D) tokens, or a map (B, D, H, W). The last `patches` tokens are patch tokens. The first of the
            other tokens, if any, is the class token.
        patches: number of patch tokens; None if the model has no plain grid (then all tokens count as patches).
    """
    patches_BLD = patch_tokens(hidden, patches)
    mean_BD = patches_BLD.mean(dim=1)
    if pool == "mean":
        return mean_BD
    if hidden.ndim == 4 or hidden.shape[1] == patches_BLD.shape[1]:
        raise ExportError("the model has no class token", where=f"--pool {pool}", fix="--pool mean")
    cls_BD = hidden[:, 0].float()
    return cls_BD if pool == "cls" else torch.cat([mean_BD, cls_BD], dim=1)


def patch_tokens(hidden: Tensor, patches: int | None) -> Tensor:
    """Return the patch tokens of a last hidden state (see `pool_tokens`): fp32 (B, L, D), row by row."""
    if hidden.ndim == 4:
        return hidden.flatten(2).transpose(1, 2).float()
    prefix = 0 if patches is None else max(hidden.shape[1] - patches, 0)
    return hidden[:, prefix:].float()


def load_vision(folder: Path, pool: Pool, device: torch.device) -> VisionModel:
    """Load a vision model from any Hub folder, in fp32, and encode one image to check the image size. Raise ExportError
    if it cannot be used."""
    if not (folder / "config.json").is_file():
        raise ExportError("no config.json in the model folder", where=str(folder), fix="give the folder of an export")
    if not (folder / "preprocessor_config.json").is_file():
        raise ExportError(
            "no preprocessor_config.json in the model folder",
            where=str(folder),
            why="it contains the image size and the normalization of the training",
            fix="give the folder of an export, or add the file of the original model",
        )
    with loading(folder, "model"):
        model, info = AutoModel.from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            **no_pooling_layer(folder),
        )
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        raise ExportError(
            f"{len(missing)} tensors are missing and {len(info['mismatched_keys'])} have another shape, e.g."
            f" {(missing or sorted(info['mismatched_keys']))[0]}",
            where=str(folder),
            why="they would be random numbers",
            fix="download or export the model again",
        )
    if getattr(model.config, "text_config", None) is not None:
        raise ExportError(
            f"the folder must have a vision model, got a zero-shot model: a {model.config.model_type} with text",
            where=str(folder),
            fix="use a folder of `export --task features`; this one is for the pipeline zero-shot-image-classification",
        )
    of_timm = isinstance(processor, TimmWrapperImageProcessor)
    file = folder / ("config.json" if of_timm else "preprocessor_config.json")
    with loading(file, "image processor", "correct the values in this file, or download it again"):
        crop, pixel_norm = transforms_of(processor, str(file))
    vision = VisionModel(model.eval(), processor, crop, pool, pixel_norm)
    try:
        with torch.no_grad():
            vision.hidden(torch.zeros(1, 3, crop.size, crop.size, dtype=torch.uint8))
    except (ValueError, RuntimeError) as error:
        raise ExportError(
            f"the model cannot encode images of {crop.size} × {crop.size} pixels: {_first_line(error)}",
            where=str(file),
            fix="set the sizes in this file to the image size of the model",
        ) from None
    model.to(device)
    if pixel_norm is not None:
        pixel_norm.to(device)
    return vision


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def loading(where: Path, name: str, fix: str = "download or export it again") -> Iterator[None]:
    """Load a stock model without messages of `transformers`. Its errors become an `ExportError`."""
    try:
        with quiet_loading():
            yield
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ExportError(f"the {name} does not load: {_first_line(error)}", where=str(where), fix=fix) from None


def load_stock(kind: Any, folder: Path, name: str) -> Any:
    """Load a stock model in fp32, and check that its weights are complete. `name` is the model's name in errors."""
    with loading(folder, name):
        model, info = kind.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        )
    faulty = sorted([*info["missing_keys"], *info["mismatched_keys"]], key=str)
    if faulty:
        raise ExportError(
            f"{len(faulty)} tensors of the {name} are missing or have another shape, e.g. {faulty[0]}",
            where=str(folder),
            fix="download or export it again",
        )
    return model


def architectures(folder: Path) -> list[str]:
    """Return the classes in config.json of a model; empty if it is invalid, which is reported on loading."""
    try:
        values = read_json(folder / "config.json")
    except (OSError, ValueError):
        return []
    names = values.get("architectures") if isinstance(values, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def no_pooling_layer(folder: Path) -> dict[str, bool]:
    """Return arguments that omit the pooling layer. It is not used here, and without weights transformers would
    initialize it randomly."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = MODEL_MAPPING.get(type(config), None)
    known = kind is not None and "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if known else {}


def pixel_features(images_BCHW: Tensor) -> Tensor:
    """Return the image at 32 × 32, values in 0…1, flattened (B, 3072): the raw-pixel baseline."""
    small = nn.functional.interpolate(
        images_BCHW.float(), size=(PIXEL_SIDE, PIXEL_SIDE), mode="bilinear", antialias=True, align_corners=False
    )
    return (small / 255).flatten(1)


def unit_rows(features_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalize rows to unit length; zero rows remain zero."""
    norms = np.linalg.norm(features_ND, axis=1, keepdims=True)
    return cast(NDArray[np.float32], features_ND / np.maximum(norms, np.finfo(np.float32).tiny))
