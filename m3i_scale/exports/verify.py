"""Verification of an export: load it with standard classes in a fresh process, and compare it with training modules.

An ONNX file is written and compared in the same way.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3i_scale.errors import ExportError
from m3i_scale.exports import fresh
from m3i_scale.exports.reference import Reference, padding_of
from m3i_scale.files import read_json, write_json

RELATIVE_TOLERANCE = 1e-4
"""Relative to the largest output. Both sides compute in fp32, so only the order of sums may differ."""

LEVELS_TOLERANCE = {"exact": 0.01, "pixels": 8.0}
"""Allowed difference of the image processor in gray levels (of 255). With Pillow, the filter of training, there is
none. The default filter, torchvision's bicubic, differs slightly."""

TIMEOUT_S = 3_600.0
_NEEDED_FOR_ONNX = ("onnx", "onnxscript", "onnxruntime")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_NOT_PASSED_ON = ("PYTHONPATH", "PYTHONHOME", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


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
    errors = list(_errors(report, outputs, reference))
    if errors:
        raise ExportError(
            f"verification failed: the export differs from the trained model: {errors[0]}",
            where=str(folder),
            why=f"{len(errors)} errors in total, found by loading it in a new process",
            fix="check the disk and the library versions, then export again",
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
        "padding": padding_of(reference.parts),
    }


def _run(folder: Path, work: Path) -> dict[str, Any]:
    run_fresh("main", folder, work)
    report: dict[str, Any] = read_json(work / "report.json")
    return report


def _errors(report: dict[str, Any], outputs: dict[str, Tensor], reference: Reference) -> Iterator[str]:
    yield from (f"it needs {name} to load" for name in report["needed"])
    parts = {part.name for part in reference.parts}
    for name in sorted(parts - report["models"].keys()):
        yield f"the {name} model is missing"
    if "tokens" in outputs and reference.tokens is not None and not torch.equal(outputs["tokens"], reference.tokens):
        yield "the tokenizer cuts captions into other tokens"
    for name in sorted(parts & report["models"].keys()):
        # Other versions of transformers may rename parameters; then only loading and outputs are compared.
        names = report.get("transformers") == transformers.__version__
        for error in _model_errors(report["models"][name], reference, name, names=names):
            yield f"{name} model: {error}"
        for key, found in outputs.items():
            if key.split(".")[:2] == ["output", name] and not close(found, wanted := _wanted(key, reference)):
                which = "" if key == f"output.{name}" else f" ({key.split('.')[2]})"
                far = f"{difference(found, wanted):.3g}"
                yield f"{name} model: outputs{which} differ by {far} from the training modules'"
    heads = report["heads"]
    yield from (
        f"heads: {error}" for error in _differing(heads["fingerprints"], reference.fingerprints.get("heads", {}))
    )
    for (backend, tolerance), (name, wanted) in product(LEVELS_TOLERANCE.items(), reference.trained_on.items()):
        levels = 255 * max(reference.std) * difference(outputs[f"{backend}.{name}"], wanted)
        if levels > tolerance:
            yield f"the image processor's '{name}' picture differs by {levels:.3g} gray levels from training's"


def _wanted(key: str, reference: Reference) -> Tensor:
    """Return the expected output; another library must match the part's output."""
    name = key.removeprefix("output.")
    return reference.outputs[name if name in reference.outputs else name.split(".")[0]]


def _model_errors(facts: dict[str, Any], reference: Reference, name: str, *, names: bool) -> Iterator[str]:
    if facts["dtypes"] != [reference.dtype] or facts["config_dtype"] != reference.dtype:
        yield (
            f"tensors are {'/'.join(facts['dtypes'])} and config.json says {facts['config_dtype']}, where"
            f" {reference.dtype} was asked for"
        )
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
        yield from (f"after loading, {error}" for error in _differing(facts["loaded"], reference.fingerprints[name]))


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


def run_fresh(program: str, folder: Path, work: Path) -> None:
    """Run a program of `fresh.py` on an export in an isolated process in `work`, without this package and without
    network. Modeling files are copied there before they run, never into the user's cache."""
    inherited = {key: value for key, value in os.environ.items() if key not in _NOT_PASSED_ON}
    environment = inherited | _OFFLINE | {"HF_MODULES_CACHE": str(work / "modules")}
    # The same thread count as here: another summation order may swap objects with nearly equal scores.
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(Path(fresh.__file__).resolve()), program, str(folder.resolve()), str(work)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
            cwd=work,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"a new process did not load the export within {TIMEOUT_S:g} s",
            where=str(folder),
            fix="check the load of the machine and of its disk, then export again",
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ExportError(
            f"a new process cannot load the export: {lines[-1]}",
            where=str(folder),
            why="\n".join(lines[-12:-1]),
            fix="check the versions of torch and transformers, and the disk; then export again",
        )


def check_onnx() -> None:
    """Raise an error if packages for ONNX files are missing."""
    missing = [name for name in _NEEDED_FOR_ONNX if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{' and '.join(missing)} not installed", where="--format onnx", fix="run `pip install -e '.[onnx]'`"
        )


def write_onnx(folder: Path, reference: Reference) -> float:
    """Write the first model of a verified folder as `model.onnx`; return the largest difference from training's
    outputs.

    One fresh process converts the model as loaded from the folder. Another one, without the model's class or
    `transformers`, runs the ONNX file on the reference images: in one batch, then a single one.
    """
    part = reference.parts[0]
    if part.name == "detector":
        raise ExportError(
            "an ONNX file needs a fixed number of outputs, but the number of detected objects depends on the image",
            where="--format onnx",
            fix="leave out --format onnx",
        )
    if part.inputs != ("pixel_values",):
        raise ExportError(
            f"an ONNX file needs a model that reads images, but a {part.name} model reads {', '.join(part.inputs)}",
            where="--format onnx",
            fix="leave out --format onnx, or use --task features",
        )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_file({"pixel_values": reference.pixels.contiguous()}, work / "inputs.safetensors")
        job = {"auto": part.auto, "options": part.options, "output": part.output}
        write_json(work / "job.json", job)
        for program in ("write_onnx", "run_onnx"):
            run_fresh(program, folder, work)
        outputs = load_file(work / "outputs.safetensors")
    largest = 0.0
    for count, output in ((len(reference.pixels), outputs["all"]), (1, outputs["one"])):
        expected = reference.outputs[part.name][:count]
        largest = max(largest, difference(output, expected))
        if not close(output, expected):
            raise ExportError(
                f"the ONNX file differs from the trained model by {largest:.3g} on {count} images",
                where="--format onnx",
                fix="leave out --format onnx, or try other versions of onnx and onnxscript",
            )
    return largest
