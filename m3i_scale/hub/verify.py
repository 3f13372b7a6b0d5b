"""The proof: what a fresh process loads with stock classes is what was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m3i_scale.config import AugmentConfig
from m3i_scale.data.views import ViewMaker
from m3i_scale.errors import ExportError
from m3i_scale.hub import fresh
from m3i_scale.hub.source import Source
from m3i_scale.hub.write import TEXT, VISION, head_weights, part_of
from m3i_scale.objective.build import build_objective, is_kept
from m3i_scale.objective.information import Objective
from m3i_scale.objective.inputs import normalize

TIMEOUT_S = 3_600.0
RELATIVE_TOLERANCE = 1e-4
"""Of the largest output: both sides compute in fp32, only the order of sums may differ."""

LEVELS_TOLERANCE = 2.0
"""Grey levels (of 255) that two bicubic filters may differ by on a smooth picture."""

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Reference:
    """What must come out, computed from the checkpoint's weights by the training modules."""

    pixels: Tensor
    """Probe input (B, 3, H, W), normalised as in training."""
    pictures: dict[str, Image.Image]
    trained_on: dict[str, Tensor]
    """The pictures as training would feed them (centre square, normalised)."""
    captions: list[str]
    tokens: Tensor | None
    hidden: dict[str, Tensor]
    """Last hidden state, by model."""
    fingerprints: dict[str, dict[str, str]]
    """Of every tensor, by model (vision, text, heads)."""
    dtype: str
    std: tuple[float, float, float]


@torch.no_grad()
def make_reference(
    source: Source, weights: dict[str, Tensor], dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase | None
) -> Reference:
    """Run the training modules on fixed inputs.

    Args:
        source: the checkpoint.
        weights: all of its weights by full name.
        dtype: that the export is written in; the reference computes in fp32 with weights rounded to it.
        tokenizer: of the text tower; None without a text target.
    """
    objective = _objective(source, weights, dtype)
    side, augment = objective.student.image_size, source.run.data.augment
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)
    pixels_BCHW = normalize(images_BCHW, augment.mean, augment.std)
    hidden = {"vision": objective.student.last_hidden_state(pixels_BCHW)}
    fingerprints = {
        "vision": _fingerprints(part_of(weights, VISION, dtype)),
        "heads": _fingerprints(head_weights(source.recipe, weights, dtype)),
    }
    captions, tokens_BT = [], None
    if tokenizer is not None and objective.text is not None:
        captions = _captions(tokenizer)
        tokens = tokenizer(
            captions, padding=True, truncation=True, max_length=source.run.text.max_tokens, return_tensors="pt"
        )
        tokens_BT = tokens["input_ids"]
        output = objective.text.model(input_ids=tokens_BT, attention_mask=tokens["attention_mask"])
        hidden["text"] = output.last_hidden_state
        fingerprints["text"] = _fingerprints(part_of(weights, TEXT, dtype))
    pictures = {"square": _picture(side, side), "wide": _picture(side, 2 * side), "tall": _picture(3 * side, 2 * side)}
    return Reference(
        pixels_BCHW,
        pictures,
        {name: _as_trained(picture, side, augment) for name, picture in pictures.items()},
        captions,
        tokens_BT,
        hidden,
        fingerprints,
        str(dtype).removeprefix("torch."),
        augment.std,
    )


def verify(folder: Path, reference: Reference) -> dict[str, Any]:
    """Load `folder` in a fresh process and compare everything with the reference.

    Returns:
        What was proven: largest differences of outputs and pixels, numbers of tensors, the classes that loaded.

    Raises:
        ExportError: the folder does not load, or loads as something else.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_file({"pixel_values": reference.pixels.contiguous()}, work / "inputs.safetensors")
        (work / "captions.json").write_text(json.dumps(reference.captions), encoding="utf-8")
        for stem, picture in reference.pictures.items():
            picture.save(work / f"{stem}.png")
        report = _run(folder, work)
        outputs = load_file(work / "outputs.safetensors")
    faults = list(_faults(report, outputs, reference))
    if faults:
        raise ExportError(
            f"the export is not what was trained: {faults[0]}",
            where=str(folder),
            why=f"{len(faults)} faults in all; found by loading it in a fresh process",
            fix="look for a fault of the disk or a mix of library versions, then export anew",
        )
    return {
        "classes": {name: facts["class"] for name, facts in report["models"].items()} | {"image": report["processor"]},
        "tensors": {name: len(tensors) for name, tensors in reference.fingerprints.items()},
        "largest_output_difference": {
            name: _difference(outputs[f"hidden.{name}"], wanted) for name, wanted in reference.hidden.items()
        },
        "largest_pixel_difference": {
            name: _difference(outputs[f"pixels.{name}"], wanted) for name, wanted in reference.trained_on.items()
        },
    }


def _run(folder: Path, work: Path) -> dict[str, Any]:
    command = [sys.executable, "-I", str(Path(fresh.__file__).resolve()), str(folder.resolve()), str(work)]
    # Modelling files of a folder are copied there before they run: never into, nor out of, the user's cache.
    environment = os.environ | _OFFLINE | {"HF_MODULES_CACHE": str(work / "modules")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, cwd=work, check=False
        )
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"the fresh process did not load the export within {TIMEOUT_S:g} s", where=str(folder)
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ExportError(
            f"a fresh process cannot load the export: {lines[-1]}", where=str(folder), why="\n".join(lines[-12:-1])
        )
    report: dict[str, Any] = json.loads((work / "report.json").read_text(encoding="utf-8"))
    return report


def _faults(report: dict[str, Any], outputs: dict[str, Tensor], reference: Reference) -> Iterator[str]:
    yield from (f"it needs {name} to load" for name in report["needed"])
    for name in sorted(reference.hidden.keys() ^ report["models"].keys()):
        yield f"the {name} model is {'missing' if name in reference.hidden else 'unexpected'}"
    if "tokens" in outputs and reference.tokens is not None and not torch.equal(outputs["tokens"], reference.tokens):
        yield "the tokenizer cuts captions into other tokens"
    for name in sorted(reference.hidden.keys() & report["models"].keys()):
        for fault in _model_faults(report["models"][name], reference, name):
            yield f"{name} model: {fault}"
        wanted, found = reference.hidden[name], outputs.get(f"hidden.{name}")
        if found is not None and not _close(found, wanted):
            yield f"{name} model: outputs differ by {_difference(found, wanted):.3g} from the training modules'"
    heads = report["heads"]
    yield from (f"heads: {fault}" for fault in heads["faults"])
    yield from (f"heads: {fault}" for fault in _differing(heads["fingerprints"], reference.fingerprints["heads"]))
    for name, wanted in reference.trained_on.items():
        levels = _difference(outputs[f"pixels.{name}"], wanted) * 255 * max(reference.std)
        if levels > (0.01 if name == "square" else LEVELS_TOLERANCE):
            yield f"the image processor's '{name}' picture differs by {levels:.3g} grey levels from training's"


def _model_faults(facts: dict[str, Any], reference: Reference, name: str) -> Iterator[str]:
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
    # A pooling layer is added by default and trained by nobody; anything else that is missing would be random.
    missing = [key for key in facts["plain"].get("missing_keys", []) if not key.startswith("pooler.")]
    if missing:
        yield f"{len(missing)} missing keys, e.g. {missing[0]}"
    if facts["loaded_dtype"] != reference.dtype:
        yield f"it loads as {facts['loaded_dtype']}"
    yield from (f"after loading, {fault}" for fault in _differing(facts["loaded"], reference.fingerprints[name]))


def _differing(found: dict[str, str], wanted: dict[str, str]) -> Iterator[str]:
    for name in sorted(found.keys() | wanted.keys()):
        if name not in wanted:
            yield f"tensor {name} is not in the checkpoint"
        elif name not in found:
            yield f"tensor {name} is missing"
        elif found[name] != wanted[name]:
            yield f"tensor {name} is not that of the checkpoint"


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float("inf") if found.shape != wanted.shape else (found - wanted).abs().max().item()


def _close(found: Tensor, wanted: Tensor) -> bool:
    scale = max(wanted.abs().max().item(), 1e-6)
    return _difference(found, wanted) <= RELATIVE_TOLERANCE * scale  # NaN is not


def _objective(source: Source, weights: dict[str, Tensor], dtype: torch.dtype) -> Objective:
    with init_empty_weights(include_buffers=False):
        objective = build_objective(source.run, source.label_sets, source.vocab_size, target_encoders=False)
    kept = {name: tensor for name, tensor in weights.items() if is_kept(source.recipe, name)}
    rounded = {name: tensor.to(dtype).float() for name, tensor in kept.items()}
    try:
        missing, unexpected = objective.load_state_dict(rounded, strict=False, assign=True)
    except RuntimeError as error:
        raise ExportError(
            f"the checkpoint does not fit its own run file: {str(error).splitlines()[-1].strip()}",
            where=str(source.checkpoint),
        ) from None
    missing = [name for name in missing if is_kept(source.recipe, name)]
    if missing or unexpected:
        raise ExportError(
            f"the checkpoint does not fit its own run file: {len(missing)} parameters are missing and"
            f" {len(unexpected)} are not known, e.g. {[*missing, *unexpected][0]}",
            where=str(source.checkpoint),
        )
    return objective.eval()


def _fingerprints(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: fresh.fingerprint(tensor) for name, tensor in tensors.items()}


def _captions(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A short, a long and an unusual caption, of words that the vocabulary has."""
    words = [word for word in sorted(tokenizer.get_vocab()) if word.isalpha()]
    return [words[0] if words else "a", " ".join(words[:: max(len(words) // 100, 1)]), "ÿ 1 !"]


def _picture(height: int, width: int) -> Image.Image:
    """A smooth colour picture."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * x + b * y)) for a, b in ((1, 0.5), (0.5, 1), (1, -1))]
    return Image.fromarray(np.uint8(np.stack(waves, axis=-1) * 100 + 128))


def _as_trained(picture: Image.Image, side: int, augment: AugmentConfig) -> Tensor:
    view = ViewMaker(augment, views=1, image_size=side, augment=False)
    return normalize(torch.from_numpy(view(picture.copy(), 0).pixels_VCHW), augment.mean, augment.std)
