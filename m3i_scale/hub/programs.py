"""The model as a program beside its weights: a `torch.export` archive or an ONNX file, for any number of images."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from m3i_scale.errors import ExportError, did_you_mean
from m3i_scale.hub import fresh_programs
from m3i_scale.hub.process import run_fresh
from m3i_scale.hub.tensors import Part
from m3i_scale.hub.verify import Reference, close, difference

PROGRAMS = ("torch_export", "onnx")
_ONNX = ("onnx", "onnxscript", "onnxruntime")


def check_also(also: tuple[str, ...]) -> None:
    """Whether there are such programs, and what makes them is installed.

    Raises:
        ExportError: not so.
    """
    for name in also:
        if name not in PROGRAMS:
            raise ExportError(f"no program '{name}'", where="--also", fix=did_you_mean(name, PROGRAMS))
    missing = [name for name in _ONNX if "onnx" in also and importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{' and '.join(missing)} not installed", where="--also onnx", fix="pip install 'm3i-scale[onnx]'"
        )


def write_programs(folder: Path, reference: Reference, also: tuple[str, ...]) -> dict[str, float]:
    """Write the first model of a proven folder as programs, and compare their outputs with the training modules'.

    A fresh process traces the model as the folder gives it; another one, which has neither the model's class nor
    `transformers`, runs what was written, on the reference's images all at once and one alone.

    Args:
        folder: the export, proven.
        reference: what the outputs must be.
        also: `torch_export`, `onnx`.

    Returns:
        Largest difference of the outputs, by program.

    Raises:
        ExportError: the model cannot be traced, or the program computes something else.
    """
    if not also:
        return {}
    part = reference.parts[0]
    if part.inputs != ("pixel_values",):
        raise ExportError(
            f"a {part.name} model reads {', '.join(part.inputs)}, and programs are made of models that read images",
            where="--also",
        )
    found: dict[str, float] = {}
    wanted = reference.outputs[part.name]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_file({"pixel_values": reference.pixels.contiguous()}, work / "inputs.safetensors")
        (work / "job.json").write_text(json.dumps(_job(part, also)), encoding="utf-8")
        for phase in ("trace", "run"):
            run_fresh(
                [str(Path(fresh_programs.__file__).resolve()), phase, str(folder.resolve()), str(work)], folder, work
            )
        outputs = load_file(work / "outputs.safetensors")
    for program in also:
        found[program] = _compare(program, outputs, wanted)
    return found


def _compare(program: str, outputs: dict[str, Tensor], wanted: Tensor) -> float:
    together, alone = outputs[f"{program}.all"], outputs[f"{program}.one"]
    for output, expected, what in ((together, wanted, f"{len(wanted)} images"), (alone, wanted[:1], "one image")):
        if not close(output, expected):
            raise ExportError(
                f"the {program} program differs by {difference(output, expected):.3g} from training on {what}",
                where="--also",
            )
    return max(difference(together, wanted), difference(alone, wanted[:1]))


def _job(part: Part, also: tuple[str, ...]) -> dict[str, Any]:
    return {"auto": part.auto, "options": part.options, "output": part.output, "also": list(also)}
