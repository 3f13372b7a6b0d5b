"""Images are resized, cropped and normalized like by the image processors of transformers and timm."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import TimmWrapperImageProcessor

from m3i_scale.errors import ExportError
from m3i_scale.evaluation.decoding import center_mask, center_pixels
from m3i_scale.evaluation.processors import processed, transforms_of

SQUARE = {"height": 32, "width": 32}
LARGER = {"height": 37, "width": 37}
SHAPES = [(60, 43), (43, 60), (50, 50), (33, 90), (32, 32), (20, 25)]
STANDARD = {
    "ViT": {"size": SQUARE},
    "CLIP": {"size": {"shortest_edge": 32}, "crop_size": SQUARE},
    "Siglip": {"size": SQUARE},
    "Bit": {"size": {"shortest_edge": 37}, "crop_size": SQUARE},  # DINOv2
    "Beit": {"size": LARGER, "crop_size": SQUARE, "do_center_crop": True},
    "ConvNext": {"size": {"shortest_edge": 32}},
    "PoolFormer": {"size": {"shortest_edge": 32}, "crop_size": SQUARE},
    "EfficientNet": {"size": SQUARE, "resample": 0},
    "MobileNetV2": {"size": {"shortest_edge": 37}, "crop_size": SQUARE, "resample": 1},
}


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prepared(processor, image: Image.Image) -> torch.Tensor:
    crop, pixel_norm = transforms_of(processor, "here")
    pixels = torch.from_numpy(center_pixels(image, crop))[None]
    return processed(processor, pixels) if pixel_norm is None else pixel_norm(pixels)


@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.parametrize(("backend", "bound"), [("Pil", 1e-6), ("", 0.02)])
def test_pixels_are_those_of_transformers(name, backend, bound) -> None:
    processor = getattr(transformers, f"{name}ImageProcessor{backend}")(**STANDARD[name])
    for shape in SHAPES:
        image = noise(*shape)
        expected = processor(image, return_tensors="pt")["pixel_values"]
        assert (prepared(processor, image) - expected).abs().mean() < bound


def test_large_images_of_convnext_are_stretched() -> None:
    processor = transformers.ConvNextImageProcessorPil(size={"shortest_edge": 384})
    image = noise(60, 43)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(prepared(processor, image), expected)


def test_values_that_are_not_rescaled_stay_bytes() -> None:
    processor = transformers.ViTImageProcessorPil(size=SQUARE, do_rescale=False, do_normalize=False)
    image = noise(60, 43)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(prepared(processor, image), expected)


def test_inputs_may_be_negative() -> None:
    transforms_of(transformers.ViTImageProcessor(size=SQUARE, image_mean=[1.0] * 3), "here")


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_pixels_are_those_of_timm(mode) -> None:
    config = {
        "input_size": (3, 32, 32),
        "crop_pct": 0.875,  # 36 pixels
        "crop_mode": mode,
        "interpolation": "bilinear",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    processor = TimmWrapperImageProcessor(config)
    for shape in [*SHAPES, (72, 59)]:  # 43 pixels long: torchvision rounds its offset of 5.5 up
        image = noise(*shape)
        torch.testing.assert_close(prepared(processor, image), processor(image)["pixel_values"])


@pytest.mark.parametrize(
    ("processor", "what"),
    [
        (transformers.LevitImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE), "must only"),  # 256/224 of it
        (transformers.BitImageProcessor(size={"shortest_edge": 24}, crop_size=SQUARE), "24 pixels, less"),
        (transformers.ViTImageProcessor(size={"height": 32, "width": 48}), "no square"),
        (transformers.ViTImageProcessor(size=SQUARE, do_resize=False), "do_resize"),
        (SimpleNamespace(size={"longest_edge": 32}), "no square"),
        (transformers.BitImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}, crop_size=SQUARE), "no square"),
        (transformers.ViTImageProcessor(size=SQUARE, do_pad=True, pad_size={"height": 48, "width": 48}), "must only"),
        (transformers.ViTImageProcessor(size=SQUARE, image_std=[0.0, 0.0, 0.0]), "must only"),
        (TimmWrapperImageProcessor({"input_size": (3, 32, 32), "crop_mode": "border"}), "'border' is not supported"),
        (TimmWrapperImageProcessor({"input_size": (3, 32, 48)}), "must be square"),
    ],
)
def test_other_processors_are_errors(processor, what) -> None:
    with pytest.raises(ExportError, match=what) as caught:
        transforms_of(processor, "here")
    assert caught.value.where == "here"
    assert caught.value.fix


@pytest.mark.parametrize("name", ["ViT", "Bit", "Beit", "CLIP"])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_have_the_crop_of_the_image(name, shape) -> None:
    """An image with one value per 16 × 16 block and a mask with the same values agree wherever filters do not mix."""
    processor = getattr(transformers, f"{name}ImageProcessor")(**STANDARD[name])
    crop, _ = transforms_of(processor, "here")
    rows, columns = np.indices(shape)
    mask = ((rows // 16 + columns // 16) % 2).astype(np.uint8)
    image = Image.fromarray(np.repeat(mask[:, :, None] * 255, 3, axis=2))
    found = center_mask(Image.fromarray(mask), crop)
    pixels = center_pixels(image, crop)[0]
    sure = (pixels < 10) | (pixels > 245)
    assert found is not None
    assert sure.mean() > 0.5
    assert (found[sure] == (pixels[sure] > 127)).all()
