"""Pictures of the patches of images: principal components of their features as colors, the similarity of one patch to
all others, and their weight in the image vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import TimmWrapperModel

from m3i_scale.evaluation import NotMeasuredError
from m3i_scale.evaluation.dense import grid_side
from m3i_scale.evaluation.features import patch_tokens
from m3i_scale.evaluation.pictures.draw import Cell, framed, grid, heat_over
from m3i_scale.run.callbacks import Picture

CLASS_TOKEN = "Attention of the class token to the patches, last layer"
_COLUMNS = 8
_SHARP = 8
"""Minimum pixels per patch before the picture is resized."""
_LARGE = 288
"""Minimum size in pixels of an image with a framed patch."""
_TAILS = (1.0, 99.0)
"""Percentiles of a component for minimum and maximum brightness: outliers would leave no contrast."""


def check_finite(values: NDArray[np.float64]) -> None:
    """Raise NotMeasuredError if there are NaN or infinite values."""
    if not np.isfinite(values).all():
        raise NotMeasuredError("the features hold NaN or infinities")


def pca_colours(tokens_NLD: NDArray[np.float64], brightness_NL: NDArray[np.float64]) -> tuple[NDArray[np.uint8], float]:
    """Return the first three principal components of all patches as red, green and blue (N, L, 3), and their fraction
    of the variance, 0 to 1. Constant features are black, with fraction 0. At least three channels are required.

    All images share one basis and one range per component, so a color means the same feature in all of them. The sign
    of a component is chosen so that brighter patches get larger values. This depends on the images, not on the model's
    channels, so pictures are comparable across steps and models.
    """
    tokens_PD = tokens_NLD.reshape(-1, tokens_NLD.shape[-1]).astype(np.float64)
    centred_PD = tokens_PD - tokens_PD.mean(axis=0)
    variances_D, basis_DD = np.linalg.eigh(centred_PD.T @ centred_PD)  # ascending
    components_P3 = centred_PD @ basis_DD[:, :-4:-1]
    bright_P = (brightness_NL - brightness_NL.mean()).ravel()
    components_P3 = np.where(bright_P @ components_P3 < 0, -components_P3, components_P3)
    low_3, high_3 = np.percentile(components_P3, _TAILS, axis=0)
    shares_P3 = np.clip((components_P3 - low_3) / np.maximum(high_3 - low_3, np.finfo(np.float32).tiny), 0, 1)
    total, held = float(variances_D.sum()), float(variances_D[-3:].sum())
    colours_NL3 = (255 * shares_P3).round().astype(np.uint8).reshape(*tokens_NLD.shape[:2], 3)
    return colours_NL3, held / total if total > 0 else 0.0


def brightness(images: Sequence[Image.Image], side: int) -> NDArray[np.float64]:
    """Return the mean gray value of every patch: (N, side²), row by row."""
    small = [image.convert("L").resize((side, side), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(one, dtype=np.float64).ravel() for one in small])


def dense_pca(images: Sequence[Image.Image], names: Sequence[str], tokens_NLD: NDArray[np.float64]) -> Picture:
    """Return the picture `dense_pca`: images, and below them the components of their patches as colors."""
    maps, share = _pca_maps(images, tokens_NLD)
    rows: list[list[Cell | None]] = []
    for start in range(0, len(images), _COLUMNS):
        shown = range(start, min(start + _COLUMNS, len(images)))
        rows.append([Cell(images[n], names[n]) for n in shown])
        rows.append([Cell(maps[n]) for n in shown])
    return Picture(
        "dense_pca",
        f"Dense features: their first three principal components as red, green and blue ({share:.0%} of the variance)",
        f"{len(images)} images, each above its patches in the colors of the first three principal components of their"
        f" features; one basis for all of them. Images: {'; '.join(names)}.",
        grid(rows),
    )


def dense_pca_side_by_side(
    names: Sequence[str], shown: Mapping[str, tuple[Sequence[Image.Image], NDArray[np.float64]]]
) -> Picture:
    """Return the picture `dense_pca` of several models: images, followed by the components of each model's patches.

    `shown` has the images at the input size of each model, and the features of their patches. Every model has a
    separate basis and range, see `pca_colours`.
    """
    maps_by_model = {model: _pca_maps(*of_model) for model, of_model in shown.items()}
    images = next(iter(shown.values()))[0]
    rows = [[Cell(image), *(Cell(maps[n]) for maps, _ in maps_by_model.values())] for n, image in enumerate(images)]
    shares = ", ".join(f"{model} {share:.0%}" for model, (_, share) in maps_by_model.items())
    return Picture(
        "dense_pca",
        "Dense features: their first three principal components as red, green and blue, one basis for each model"
        f" (share of the variance: {shares})",
        f"{len(images)} images. By row: image, {', '.join(shown)}: its patches in the colors of the first three"
        f" principal components of their features; one basis for all images of a model. Images: {'; '.join(names)}.",
        grid(rows, ["image", *shown], names),
    )


def _pca_maps(images: Sequence[Image.Image], tokens_NLD: NDArray[np.float64]) -> tuple[list[Image.Image], float]:
    """Return a picture of every image's patches in the colors of their components, and the fraction of the variance."""
    check_finite(tokens_NLD)
    side = grid_side(tokens_NLD.shape[1])
    colours_NL3, share = pca_colours(tokens_NLD, brightness(images, side))
    sharp = (side * _SHARP, side * _SHARP)
    patches = [Image.fromarray(colours_L3.reshape(side, side, 3)) for colours_L3 in colours_NL3]
    return [image.resize(sharp, Image.Resampling.NEAREST) for image in patches], share


def cosines(token_ND: NDArray[np.float64], tokens_NLD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine between one vector per image and all of its patches: (N, L)."""
    norms_NL = np.linalg.norm(tokens_NLD, axis=-1) * np.linalg.norm(token_ND, axis=-1)[:, None]
    products_NL = np.einsum("nd,nld->nl", token_ND, tokens_NLD)
    cosines_NL: NDArray[np.float64] = products_NL / np.maximum(norms_NL, np.finfo(np.float32).tiny)
    return cosines_NL


def similarity(images: Sequence[Image.Image], names: Sequence[str], tokens_NLD: NDArray[np.float64]) -> Picture:
    """Return the picture `similarity`: the patch in the middle of each image, and its cosine to all patches."""
    check_finite(tokens_NLD)
    side = grid_side(tokens_NLD.shape[1])
    middle = side // 2 * (side + 1)
    rows = []
    for image, cosines_L in zip(map(_large, images), cosines(tokens_NLD[:, middle], tokens_NLD), strict=True):
        low, high = cosines_L.min(), cosines_L.max()
        heat = heat_over(image, cosines_L.reshape(side, side), low, high)
        rows.append([Cell(framed(image, box_of(middle, side))), Cell(heat, f"{low:.2f} to {high:.2f}")])
    return Picture(
        "similarity",
        "Similarity (cosine) of the framed patch to all patches of its image",
        f"{len(images)} images with a framed patch, and how similar the features of all patches are to it. Images:"
        f" {'; '.join(names)}.",
        grid(rows, ("image", "cosine to the patch"), names),
    )


def _large(image: Image.Image) -> Image.Image:
    """Enlarge an image so that thin lines are visible."""
    times = max(_LARGE // image.width, 1)
    return image.resize((times * image.width, times * image.height), Image.Resampling.LANCZOS)


def box_of(patch: int, side: int) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a patch of a square grid, as fractions of width and height."""
    row, column = divmod(patch, side)
    return column / side, row / side, (column + 1) / side, (row + 1) / side


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
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")  # fused kernels do not return the weights
        try:
            layers = model(pixel_values=pixels_1CHW, output_attentions=True).attentions
        finally:
            model.set_attn_implementation(before)
    if not layers:
        raise NotMeasuredError(f"a {model.config.model_type} does not give its attention")
    last_1HSS: Tensor = layers[-1]
    return last_1HSS[:, :, 0, -patches:]


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
