"""Picture of patch weights in the image vector: attention of class token or pooling head, or similarity to the mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import TimmWrapperModel

from m3i_scale.evaluate import NotMeasuredError
from m3i_scale.evaluate.dense import grid_side
from m3i_scale.evaluate.features import patch_tokens
from m3i_scale.evaluate.pictures.dense import check_finite, cosines
from m3i_scale.evaluate.pictures.draw import Cell, grid, heat_over
from m3i_scale.host.picture_files import Picture

CLASS_TOKEN = "Attention of the class token to the patches, last layer"


@dataclass(frozen=True)
class Attention:
    """Weight of each patch in the image vector, for every image."""

    maps_NHL: NDArray[np.float64]
    """By head; a single map for models without attention."""
    title: str


@torch.no_grad()
def attention_of(model: Any, pixels_BCHW: Tensor, hidden: Tensor, patches: int | None) -> Attention:
    """Return the last attention of the class token, or of a pooling head (SigLIP). For other models, return the cosine
    of every patch to the mean of all patches. The model must be in evaluation mode; `pixels_BCHW` is its normalized
    input. See `pool_tokens` for `hidden` and `patches`."""
    tokens_BLD = patch_tokens(hidden, patches)
    head: Any = getattr(model, "head", None)
    if hidden.ndim == 3 and hidden.shape[1] > tokens_BLD.shape[1]:
        maps_BHL = torch.cat([_of_class_token(model, image[None], tokens_BLD.shape[1]) for image in pixels_BCHW])
        title = CLASS_TOKEN
    elif isinstance(getattr(head, "attention", None), nn.MultiheadAttention):
        query_B1D = head.probe.expand(len(hidden), -1, -1)
        maps_BHL = head.attention(query_B1D, hidden, hidden, average_attn_weights=False)[1][:, :, 0]
        title = "Attention of the pooling head to the patches"
    else:
        return similarity_to_mean(tokens_BLD.double().cpu().numpy())
    return Attention(maps_BHL.double().cpu().numpy(), title)


def similarity_to_mean(tokens_NLD: NDArray[np.float64]) -> Attention:
    """Return the map for models without attention: the cosine of every patch to the mean of all patches."""
    title = "Similarity (cosine) of every patch to the mean of all: the model has no class token"
    return Attention(cosines(tokens_NLD.mean(axis=1), tokens_NLD)[:, None], title)


def _of_class_token(model: Any, pixels_1CHW: Tensor, patches: int) -> Tensor:
    """Return the attention of one image: (1, H, L). Attention of all layers for many images would not fit in memory."""
    layers = None
    if not isinstance(model, TimmWrapperModel):
        with _eager(model):
            layers = model(pixel_values=pixels_1CHW, output_attentions=True).attentions
    if not layers:
        raise NotMeasuredError(f"a {model.config.model_type} does not give its attention")
    last_1HSS: Tensor = layers[-1]
    return last_1HSS[:, :, 0, -patches:]


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Use eager attention temporarily: fused kernels do not return the weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention(images: Sequence[Image.Image], names: Sequence[str], shown: Attention) -> Picture:
    """Return the picture `attention`: images, the mean over heads, and every head, each map scaled to its range."""
    check_finite(shown.maps_NHL)
    side, heads = grid_side(shown.maps_NHL.shape[2]), shown.maps_NHL.shape[1]
    rows = []
    for image, maps_HL in zip(images, shown.maps_NHL, strict=True):
        maps = [maps_HL.mean(axis=0), *maps_HL] if heads > 1 else [maps_HL[0]]
        heats = [heat_over(image, one_L.reshape(side, side), one_L.min(), one_L.max()) for one_L in maps]
        rows.append([Cell(image), *map(Cell, heats)])
    columns = ("image", "mean", *(f"head {number + 1}" for number in range(heads))) if heads > 1 else ("image", "")
    return Picture(
        "attention",
        shown.title,
        f"{len(images)} images, each beside how much its patches enter the image vector"
        f"{', by head' if heads > 1 else ''}. Images: {'; '.join(names)}.",
        grid(rows, columns, names),
    )
