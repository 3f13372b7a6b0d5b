"""Verification of an export: load it with standard classes in a fresh process, and compare it with training modules."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m3i_scale.config import AugmentConfig
from m3i_scale.data.views import ViewMaker
from m3i_scale.errors import ExportError
from m3i_scale.export import fresh
from m3i_scale.export.process import run_fresh
from m3i_scale.export.source import Source
from m3i_scale.export.tensors import ExportedModule, Resize
from m3i_scale.export.trained import trained_outputs
from m3i_scale.files import read_json, write_json
from m3i_scale.objective.build import build_objective
from m3i_scale.objective.information import Objective
from m3i_scale.objective.inputs import normalize

RELATIVE_TOLERANCE = 1e-4
"""Relative to the largest output. Both sides compute in fp32, so only the order of sums may differ."""

LEVELS_TOLERANCE = {"exact": 0.01, "pixels": 8.0}
"""Allowed difference of the image processor in gray levels (of 255). With Pillow, the filter of training, there is
none. The default filter, torchvision's bicubic, differs slightly."""


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
            captions, padding=True, truncation=True, max_length=source.run.text.max_tokens, return_tensors="pt"
        )
    return Reference(
        parts,
        pixels_BCHW,
        pictures,
        trained_on,
        captions,
        None if tokens is None else tokens["input_ids"],
        dict(output for part in parts for output in trained_outputs(objective, part, pixels_BCHW, tokens)),
        fingerprints,
        str(dtype).removeprefix("torch."),
        augment.std,
    )


def verify(folder: Path, reference: Reference) -> dict[str, Any]:
    """Load `folder` in a fresh process, compare everything with the reference, and return the largest differences of
    outputs and pixels, the numbers of tensors, and the loaded classes."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_file({"pixel_values": reference.pixels.contiguous()}, work / "inputs.safetensors")
        write_json(work / "captions.json", reference.captions)
        write_json(work / "job.json", _job(reference))
        for picture, image in reference.pictures.items():
            image.save(work / f"{picture}.png")
        report = _run(folder, work)
        outputs = load_file(work / "outputs.safetensors")
    faults = list(_faults(report, outputs, reference))
    if faults:
        raise ExportError(
            f"the export does not hold what was trained: {faults[0]}",
            where=str(folder),
            why=f"{len(faults)} faults in all; found by loading it in a fresh process",
            fix="look for a fault of the disk or a mix of library versions, then export anew",
        )
    return {
        "classes": {name: facts["class"] for name, facts in report["models"].items()} | {"image": report["processor"]},
        "tensors": {name: len(tensors) for name, tensors in reference.fingerprints.items()},
        "largest_output_difference": {
            key.removeprefix("output."): difference(found, _wanted(key, reference))
            for key, found in outputs.items()
            if key.startswith("output.")
        },
        "largest_pixel_difference": {
            backend: max(
                difference(outputs[f"{backend}.{name}"], wanted) for name, wanted in reference.trained_on.items()
            )
            for backend in LEVELS_TOLERANCE
        },
    }


def _job(reference: Reference) -> dict[str, Any]:
    keys = ("name", "folder", "auto", "options", "inputs", "output", "also", "native")
    texts = [part.folder for part in reference.parts if "input_ids" in part.inputs]
    return {
        "models": [{key: getattr(part, key) for key in keys} for part in reference.parts],
        "tokenizer": texts[0] if texts else None,
    }


def _run(folder: Path, work: Path) -> dict[str, Any]:
    run_fresh([str(Path(fresh.__file__).resolve()), str(folder.resolve()), str(work)], folder, work)
    report: dict[str, Any] = read_json(work / "report.json")
    return report


def _faults(report: dict[str, Any], outputs: dict[str, Tensor], reference: Reference) -> Iterator[str]:
    yield from (f"it needs {name} to load" for name in report["needed"])
    parts = {part.name for part in reference.parts}
    for name in sorted(parts - report["models"].keys()):
        yield f"the {name} model is missing"
    if "tokens" in outputs and reference.tokens is not None and not torch.equal(outputs["tokens"], reference.tokens):
        yield "the tokenizer cuts captions into other tokens"
    for name in sorted(parts & report["models"].keys()):
        # Other versions of transformers may rename parameters; then only loading and outputs are compared.
        names = report.get("transformers") == transformers.__version__
        for fault in _model_faults(report["models"][name], reference, name, names=names):
            yield f"{name} model: {fault}"
        for key, found in outputs.items():
            if key.split(".")[:2] == ["output", name] and not close(found, wanted := _wanted(key, reference)):
                which = "" if key == f"output.{name}" else f" ({key.split('.')[2]})"
                far = f"{difference(found, wanted):.3g}"
                yield f"{name} model: outputs{which} differ by {far} from the training modules'"
    heads = report["heads"]
    yield from (f"heads: {fault}" for fault in heads["faults"])
    yield from (
        f"heads: {fault}" for fault in _differing(heads["fingerprints"], reference.fingerprints.get("heads", {}))
    )
    for (backend, tolerance), (name, wanted) in product(LEVELS_TOLERANCE.items(), reference.trained_on.items()):
        levels = 255 * max(reference.std) * difference(outputs[f"{backend}.{name}"], wanted)
        if levels > tolerance:
            yield f"the image processor's '{name}' picture differs by {levels:.3g} grey levels from training's"


def _wanted(key: str, reference: Reference) -> Tensor:
    """Return the expected output; another library must match the part's output."""
    name = key.removeprefix("output.")
    return reference.outputs[name if name in reference.outputs else name.split(".")[0]]


def _model_faults(facts: dict[str, Any], reference: Reference, name: str, *, names: bool) -> Iterator[str]:
    yield from facts["faults"]
    if facts["dtypes"] != [reference.dtype] or facts["config_dtype"] != reference.dtype:
        yield (
            f"tensors are {'/'.join(facts['dtypes'])} and config.json says {facts['config_dtype']}, where"
            f" {reference.dtype} was asked for"
        )
    if "strict" not in facts:
        return
    for key, keys in facts["strict"].items():
        if keys:
            yield f"{len(keys)} {key.replace('_', ' ')}, e.g. {keys[0]}"
    # The default pooling layer is untrained. Any other missing tensor would be random.
    missing = [key for key in facts.get("plain", {}).get("missing_keys", []) if not key.startswith("pooler.")]
    if missing:
        yield f"{len(missing)} missing keys, e.g. {missing[0]}"
    if facts["loaded_dtype"] != reference.dtype:
        yield f"it loads as {facts['loaded_dtype']}"
    if names:
        yield from (f"after loading, {fault}" for fault in _differing(facts["loaded"], reference.fingerprints[name]))


def _differing(found: dict[str, str], wanted: dict[str, str]) -> Iterator[str]:
    for name in sorted(found.keys() | wanted.keys()):
        if name not in wanted:
            yield f"tensor {name} is not in the checkpoint"
        elif name not in found:
            yield f"tensor {name} is missing"
        elif found[name] != wanted[name]:
            yield f"tensor {name} is not that of the checkpoint"


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest absolute difference; infinite for different shapes."""
    if found.shape != wanted.shape:
        return float("inf")
    return (found - wanted).abs().max().item() if wanted.numel() else 0.0  # a detector may have no detections


def close(found: Tensor, wanted: Tensor) -> bool:
    """Return whether two outputs agree up to summation order."""
    scale = max(difference(wanted, torch.zeros_like(wanted)), 1e-6)
    return difference(found, wanted) <= RELATIVE_TOLERANCE * scale  # false for NaN


def _objective(source: Source, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Objective:
    with init_empty_weights(include_buffers=False):
        objective = build_objective(source.run, source.label_sets, source.vocab_size, target_encoders=False)
    kept = objective.state_dict().keys()
    rounded = {name: weights[name].to(dtype).float() for name in weights if name in kept}
    try:
        missing, unexpected = objective.load_state_dict(rounded, strict=False, assign=True)
    except RuntimeError as error:
        raise ExportError(
            f"the checkpoint does not fit its own run file: {str(error).splitlines()[-1].strip()}",
            where=str(source.checkpoint),
        ) from None
    if missing or unexpected:
        raise ExportError(
            f"the checkpoint does not fit its own run file: {len(missing)} parameters are missing and"
            f" {len(unexpected)} are not known, e.g. {[*missing, *unexpected][0]}",
            where=str(source.checkpoint),
        )
    return objective.eval()


def _captions(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    words = [word for word in sorted(tokenizer.get_vocab()) if word.isalpha()]
    return [words[0] if words else "a", " ".join(words[:: max(len(words) // 100, 1)]), "ÿ 1 !"]


def real_pictures(side: int, shown: Resize = "centre") -> dict[str, Image.Image]:
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
    if shown != "centre":
        scale = side / min(picture.size)
        width, height = (round(length * scale) if shown == "windows" else side for length in picture.size)
        resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        pixels_CHW = torch.from_numpy(resized.copy())
        windows = [part for row in pixels_CHW.split(side, dim=1) for part in row.split(side, dim=2)]
        return normalize(torch.stack(windows), augment.mean, augment.std)
    view = ViewMaker(augment, views=1, image_size=side, augment=False)
    return normalize(torch.from_numpy(view(picture.copy(), 0).pixels_VCHW), augment.mean, augment.std)
