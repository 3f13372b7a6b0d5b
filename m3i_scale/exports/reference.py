"""Fixed test inputs of an export, and the outputs of the training modules on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import init_empty_weights
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m3i_scale.config import AugmentConfig
from m3i_scale.data.views import ViewMaker
from m3i_scale.errors import ExportError
from m3i_scale.exports.source import Source
from m3i_scale.exports.tensors import ExportedModule, Resize
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective
from m3i_scale.objective.inputs import normalize


@dataclass(frozen=True)
class Reference:
    """Expected results, computed from the checkpoint's weights by the training modules."""

    parts: list[ExportedModule]
    pixels: Tensor
    """Test input (B, 3, H, W): noise and photographs, normalized as in training."""
    pictures: dict[str, Image.Image]
    trained_on: dict[str, Tensor]
    """The pictures, preprocessed as in training (see `ExportedModule.resize`; normalized)."""
    captions: list[str]
    tokens: Tensor | None
    outputs: dict[str, Tensor]
    """By part; additional outputs after a dot."""
    fingerprints: dict[str, dict[str, str]]
    """Of every tensor, by part and for the heads."""
    dtype: str
    std: tuple[float, float, float]


@torch.no_grad()
def make_reference(
    source: Source,
    parts: list[ExportedModule],
    fingerprints: dict[str, dict[str, str]],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Reference:
    """Run the training modules on fixed inputs, in fp32 with weights rounded to `dtype`. Until it returns, one fp32
    copy of the model is in memory. Without a text tower, `tokenizer` is None."""
    objective = _objective(source, weights, dtype)
    side, augment = objective.student.image_size, source.run.data.augment
    pictures = real_pictures(side, parts[0].resize)
    trained_on = {name: _as_trained(picture, side, augment, parts[0].resize) for name, picture in pictures.items()}
    noise = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels_BCHW = torch.cat([normalize(noise, augment.mean, augment.std), trained_on["square"], trained_on["wide"]])
    captions, tokens = [], None
    if tokenizer is not None:
        captions = _captions(tokenizer)
        tokens = tokenizer(
            captions,
            padding=padding_of(parts),
            truncation=True,
            max_length=source.run.text.max_tokens,
            return_tensors="pt",
        )
    inputs: dict[str, Tensor] = {"pixel_values": pixels_BCHW, **(tokens or {})}
    outputs: dict[str, Tensor] = {}
    for part in parts:
        by_name = part.trained(objective, *[inputs[name] for name in part.inputs])
        outputs[part.name] = by_name[part.output]
        outputs |= {f"{part.name}.{name}": by_name[name] for name in part.also}
    return Reference(
        parts,
        pixels_BCHW,
        pictures,
        trained_on,
        captions,
        None if tokens is None else tokens["input_ids"],
        outputs,
        fingerprints,
        str(dtype).removeprefix("torch."),
        augment.std,
    )


def padding_of(parts: list[ExportedModule]) -> str:
    """Return how captions are padded: to full length for a text encoder without attention mask (SigLIP)."""
    masked = any("attention_mask" in part.inputs for part in parts)
    return "longest" if masked else "max_length"


def _objective(source: Source, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Objective:
    with init_empty_weights(include_buffers=False):
        objective = build_objective(source.run, source.label_sets, source.vocab_size, target_encoders=False)
    kept = objective.state_dict().keys()
    rounded = {name: weights[name].to(dtype).float() for name in weights if name in kept}
    try:
        missing, unexpected = objective.load_state_dict(rounded, strict=False, assign=True)
    except RuntimeError as error:
        raise ExportError(
            f"the checkpoint does not fit its config file: {str(error).splitlines()[-1].strip()}",
            where=str(source.checkpoint),
            fix="use the version of this package that saved the checkpoint, or another checkpoint",
        ) from None
    if missing or unexpected:
        raise ExportError(
            f"the checkpoint does not fit its config file: {len(missing)} parameters are missing and "
            f"{len(unexpected)} are unknown, e.g. {[*missing, *unexpected][0]}",
            where=str(source.checkpoint),
            fix="use the version of this package that saved the checkpoint, or another checkpoint",
        )
    return objective.eval()


def _captions(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    words = [word for word in sorted(tokenizer.get_vocab()) if word.isalpha()]
    return [words[0] if words else "a", " ".join(words[:: max(len(words) // 100, 1)]), "ÿ 1 !"]


def real_pictures(side: int, shown: Resize = "center") -> dict[str, Image.Image]:
    """Return photographs (from scikit-learn) by name: a square of the model's size, a larger one, and two elongated
    ones."""
    # With these sizes torchvision's processor, which rounds the crop position differently, crops the same pixels.
    short = side if shown == "padded" else 2 * side
    flower, temple = (Image.fromarray(pixels) for pixels in reversed(load_sample_images().images))
    return {
        "square": flower.crop((100, 0, 527, 427)).resize((side, side)),
        "large": temple.crop((100, 0, 527, 427)).resize((2 * side, 2 * side)),
        "wide": temple.crop((0, 100, 639, 313)).resize((3 * short, short)),
        "tall": flower.crop((250, 0, 392, 426)).resize((short, 3 * short)),
    }


def _as_trained(picture: Image.Image, side: int, augment: AugmentConfig, shown: Resize) -> Tensor:
    if shown == "padded":
        view = ViewMaker(augment, views=1, image_size=side, augment=False, reads="boxes", mean=augment.mean)
        pixels_1CHW = normalize(torch.from_numpy(view(picture.copy(), 0).pixels_VCHW), augment.mean, augment.std)
        width, height = (round(side * length / max(picture.size)) for length in picture.size)
        # The mean color: training rounds it to a gray level, while image processors pad after normalization.
        pixels_1CHW[:, :, height:] = pixels_1CHW[:, :, :, width:] = 0
        return pixels_1CHW
    if shown != "center":
        scale = side / min(picture.size)
        width, height = (round(length * scale) if shown == "windows" else side for length in picture.size)
        resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        pixels_CHW = torch.from_numpy(resized.copy())
        windows = [part for row in pixels_CHW.split(side, dim=1) for part in row.split(side, dim=2)]
        return normalize(torch.stack(windows), augment.mean, augment.std)
    view = ViewMaker(augment, views=1, image_size=side, augment=False)
    return normalize(torch.from_numpy(view(picture.copy(), 0).pixels_VCHW), augment.mean, augment.std)
