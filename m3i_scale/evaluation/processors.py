"""Transforms of image processors of `transformers`: resizing and cropping of one image, normalization of a batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import TimmWrapperImageProcessor

from m3i_scale.data.augment import CenterCrop
from m3i_scale.errors import ExportError
from m3i_scale.evaluation.decoding import center_pixels
from m3i_scale.objective.inputs import PixelNorm

_FIX = "use a model with the image processor of ViT, CLIP, SigLIP, DINOv2 or ConvNeXt"
_ROUNDING = 0.01
"""Maximum mean difference of model inputs, relative to the largest value."""


def transforms_of(processor: Any, where: str) -> tuple[CenterCrop, PixelNorm | None]:
    """Return the transform of one image, and the normalization of a batch; None: only `processed` normalizes like the
    processor. Raise ExportError if the model input is not square, or if the processor prepares images in another way.
    """
    crop, pixel_norm = _center_crop(processor, where), _pixel_norm(processor)
    shape = (crop.size * 8 // 5, crop.size * 4 // 3, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    pixels_BCHW = torch.from_numpy(center_pixels(image, crop))[None]
    actual_BCHW = processed(processor, pixels_BCHW) if pixel_norm is None else pixel_norm(pixels_BCHW)
    expected_BCHW = processor(images=[image], return_tensors="pt")["pixel_values"]
    same = actual_BCHW.shape == expected_BCHW.shape == (1, 3, crop.size, crop.size)
    # Most processors resize with torchvision, which rounds differently than Pillow. NaN is not equal.
    bound = _ROUNDING * expected_BCHW.abs().max()
    if not (same and (actual_BCHW.float() - expected_BCHW.float()).abs().mean() <= bound):
        raise ExportError(
            "the image processor must only resize, crop the center square and normalize;"
            f" {type(processor).__name__} prepares another model input",
            where=where,
            why="the features would be wrong",
            fix=_FIX,
        )
    return crop, pixel_norm


def _center_crop(processor: Any, where: str) -> CenterCrop:
    """Return the resizing and cropping of an image processor. Raise ExportError if the model input is not square, or
    has a border."""
    if isinstance(processor, TimmWrapperImageProcessor):
        crop = _center_crop_of_timm(processor.data_config, where)
    else:
        if not getattr(processor, "do_resize", True):
            raise ExportError("do_resize of the image processor must be true", where=where, fix=_FIX)
        size, filter_number = dict(getattr(processor, "size", None) or {}), getattr(processor, "resample", None)
        short = size.get("shortest_edge")
        side = short or size.get("height")
        if not side or size.get("longest_edge") or not (short or side == size.get("width")):
            raise ExportError(f"the image processor has no square input size: {size}", where=where, fix=_FIX)
        stretch, has_crop = not short, getattr(processor, "do_center_crop", None)
        crop_size, resize_size = int(processor.crop_size["height"] if has_crop else side), int(side)
        crop_pct = getattr(processor, "crop_pct", None)
        if crop_pct and not has_crop and side >= 384:  # ConvNeXt crops only images below 384 pixels
            stretch = True
        elif crop_pct and short:
            resize_size = int(short / crop_pct)
        resample = Image.Resampling.BILINEAR if filter_number is None else Image.Resampling(filter_number)
        crop = CenterCrop(crop_size, resize_size, stretch, resample)
    if crop.resize_size < crop.size:
        raise ExportError(
            f"the image processor resizes images to {crop.resize_size} pixels, less than its crop of {crop.size}",
            where=where,
            why="a border without pixels would be part of the image",
            fix=_FIX,
        )
    return crop


def _center_crop_of_timm(config: dict[str, Any], where: str) -> CenterCrop:
    """Return the center crop of a data config of timm (`transforms_imagenet_eval`)."""
    _, height, width = config["input_size"]
    if height != width:
        raise ExportError(f"input_size of timm must be square, got {height} × {width}", where=where, fix=_FIX)
    if config["crop_mode"] not in ("center", "squash"):
        raise ExportError(f"timm's crop mode '{config['crop_mode']}' is not supported", where=where, fix=_FIX)
    stretch, resample = config["crop_mode"] == "squash", Image.Resampling[config["interpolation"].upper()]
    return CenterCrop(height, math.floor(height / config["crop_pct"]), stretch, resample, round_offset=True)


def _pixel_norm(processor: Any) -> PixelNorm | None:
    """Return a module that does (x/255 − mean) / std if the processor does the same, otherwise None."""
    if isinstance(processor, TimmWrapperImageProcessor):  # it has no options and would crop again
        return PixelNorm(processor.data_config["mean"], processor.data_config["std"])
    pixel_norm = PixelNorm((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if getattr(processor, "do_normalize", False):
        pixel_norm = PixelNorm(tuple(processor.image_mean), tuple(processor.image_std))
    images_BCHW = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).remainder(256).to(torch.uint8)
    expected_BCHW = processed(processor, images_BCHW)
    same = expected_BCHW.shape == images_BCHW.shape and torch.allclose(
        pixel_norm(images_BCHW), expected_BCHW.float(), atol=1e-5
    )
    return pixel_norm if same else None


def processed(processor: Any, images_BCHW: Tensor) -> Tensor:
    """Return the model input that a processor of `transformers` makes of uint8 (B, 3, H, W) of the right size."""
    inputs = processor(images=list(images_BCHW), do_resize=False, do_center_crop=False, return_tensors="pt")
    pixels_BCHW: Tensor = inputs["pixel_values"]
    return pixels_BCHW
