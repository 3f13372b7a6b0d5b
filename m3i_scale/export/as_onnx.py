"""ONNX file of an exported model, with a dynamic batch size."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from m3i_scale.errors import ExportError
from m3i_scale.export.reference import Reference
from m3i_scale.export.verify import close, difference, run_fresh
from m3i_scale.files import write_json

_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_onnx() -> None:
    """Raise an error if packages for ONNX files are missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{' and '.join(missing)} not installed", where="--format onnx", fix="pip install 'm3i-scale[onnx]'"
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
            "how many objects are found depends on the image, and an ONNX file has a fixed number",
            where="--format onnx",
            fix="leave it out",
        )
    if part.inputs != ("pixel_values",):
        raise ExportError(
            f"a {part.name} model reads {', '.join(part.inputs)}, and ONNX files are made of models that read images",
            where="--format onnx",
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
                f"the ONNX file differs by {largest:.3g} from training on {count} images", where="--format onnx"
            )
    return largest
