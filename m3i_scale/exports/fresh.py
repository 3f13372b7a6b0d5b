"""Script for a fresh, isolated Python process: load an export with standard classes only, and report the results.

    python -I fresh.py main|write_onnx|run_onnx EXPORT WORK

Reads: `WORK/job.json` (models and options), `WORK/inputs.safetensors`, `WORK/captions.json`, `WORK/*.png`.
Writes: `WORK/outputs.safetensors`, `WORK/report.json`; `write_onnx` only `EXPORT/model.onnx`.

This file is run by path. It imports nothing from this package, and blocks such imports in the libraries it loads.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

BLOCKED = ("m3i_scale", "deepspeed")
"""Packages of the training side that users of an export need not install."""
ONNX_FILE = "model.onnx"


def block() -> None:
    """Make the training side's packages look as if they were not installed: importing them fails from here on."""
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]


def fingerprint(tensor: Any) -> str:
    """Return the SHA-256 over dtype, shape and bytes of a tensor."""
    import torch

    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def inspect_files(folder: Path) -> dict[str, Any]:
    """Return dtypes and fingerprints of all tensors in the folder's safetensors."""
    from safetensors import safe_open

    report: dict[str, Any] = {"dtypes": set(), "fingerprints": {}}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                tensor = file.get_tensor(name)
                report["fingerprints"][name] = fingerprint(tensor)
                if tensor.is_floating_point():  # integer tensors are counters
                    report["dtypes"].add(str(tensor.dtype).removeprefix("torch."))
    report["dtypes"] = sorted(report["dtypes"])
    return report


def load(folder: Path, auto: str, *, dtype: Any = "auto", **kwargs: Any) -> tuple[Any, dict[str, list[str]]]:
    """Load a model by a class of `transformers`, and return it with the loading report. Code from the folder runs only
    if the export includes code."""
    import transformers

    has_code = (folder / "config.json").is_file() and "auto_map" in json.loads(
        (folder / "config.json").read_text("utf-8")
    )
    model, info = getattr(transformers, auto).from_pretrained(
        str(folder), output_loading_info=True, local_files_only=True, dtype=dtype, trust_remote_code=has_code, **kwargs
    )
    return model.eval(), {key: sorted(map(str, value)) for key, value in info.items()}


def examine(folder: Path, spec: dict[str, Any], inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load one model with default options. If these add an untrained layer, also load it without this layer."""
    report = inspect_files(folder)
    report["config_dtype"] = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    if spec["options"]:
        _, report["plain"] = load(folder, spec["auto"])
    model, report["strict"] = load(folder, spec["auto"], **spec["options"])
    report["class"] = type(model).__name__
    report["loaded_dtype"] = str(model.dtype).removeprefix("torch.")
    report["loaded"] = {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}
    outputs = run(model.float(), spec, inputs)
    del model
    if spec["native"] == "timm":
        outputs[f"{spec['name']}.timm"] = run_timm(folder, spec, inputs)
    return report, outputs


def run(model: Any, spec: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs to compare, the first under the part's name. For several feature maps, use the last one."""
    import torch

    with torch.no_grad():
        output = model(**{key: inputs[key] for key in spec["inputs"]})
    first = getattr(output, spec["output"])
    outputs = {spec["name"]: first[-1] if isinstance(first, tuple) else first}
    outputs |= {f"{spec['name']}.{name}": getattr(output, name) for name in spec["also"]}
    return {name: tensor.contiguous() for name, tensor in outputs.items()}


def run_timm(folder: Path, spec: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """Return the same output, computed by timm."""
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().float()
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        return (model(pixels) if spec["output"] == "logits" else model.forward_features(pixels)).contiguous()


def main(export: Path, work: Path) -> None:
    """Load the export, run it on the inputs, and write outputs and report."""
    from PIL import Image
    from safetensors.torch import load_file, save_file
    from transformers import AutoImageProcessor, AutoTokenizer, __version__

    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    inputs, outputs = load_file(work / "inputs.safetensors"), {}
    processor = AutoImageProcessor.from_pretrained(export, local_files_only=True, trust_remote_code=False)
    # The processor with the same filter as in training; the processor of a timm folder already has it.
    exact = processor
    if not type(processor).__name__.startswith("TimmWrapper"):
        by_pillow: dict[str, Any] = {"use_fast": False} if __version__.startswith("4.") else {"backend": "pil"}
        exact = AutoImageProcessor.from_pretrained(export, local_files_only=True, trust_remote_code=False, **by_pillow)
    for path in sorted(work.glob("*.png")):
        with Image.open(path) as image:
            for name, chosen in (("pixels", processor), ("exact", exact)):
                outputs[f"{name}.{path.stem}"] = chosen(image, return_tensors="pt")["pixel_values"].contiguous()
    report: dict[str, Any] = {"transformers": __version__, "processor": type(processor).__name__, "models": {}}
    if job["tokenizer"] is not None and (export / job["tokenizer"]).is_dir():
        captions = json.loads((work / "captions.json").read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(
            export / job["tokenizer"], local_files_only=True, trust_remote_code=False
        )
        tokens = dict(tokenizer(captions, padding=job["padding"], truncation=True, return_tensors="pt"))
        inputs |= {key: tokens[key].contiguous() for key in ("input_ids", "attention_mask") if key in tokens}
        outputs["tokens"] = inputs["input_ids"]
    for spec in job["models"]:
        if (export / spec["folder"]).is_dir():
            report["models"][spec["name"]], found = examine(export / spec["folder"], spec, inputs)
            outputs |= {f"output.{name}": tensor for name, tensor in found.items()}
    report["heads"] = inspect_files(export / "heads")
    report["needed"] = [name for name in BLOCKED if sys.modules.get(name) is not None]
    save_file(outputs, work / "outputs.safetensors")
    (work / "report.json").write_text(json.dumps(report), encoding="utf-8")


def write_onnx(export: Path, work: Path) -> None:
    """Write the ONNX file of the model, with a dynamic batch size."""
    import torch
    from safetensors.torch import load_file

    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    model, _ = load(export, job["auto"], dtype=torch.float32, **job["options"])
    name = job["output"]

    class Output(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            output = getattr(self.model(pixel_values), name)
            return output[-1] if isinstance(output, tuple) else output

    module = Output().eval()
    pixels = load_file(work / "inputs.safetensors")["pixel_values"]
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=4096)}}
    with torch.no_grad():
        program = torch.export.export(module, (pixels,), dynamic_shapes=shapes)
    torch.onnx.export(
        program,
        (),
        export / ONNX_FILE,
        input_names=["pixel_values"],
        output_names=[name],
        external_data=False,
        dynamo=True,
        verbose=False,
    )


def run_onnx(export: Path, work: Path) -> None:
    """Run the ONNX file, without `transformers`, on all images in one batch, and on the first image alone."""
    sys.modules["transformers"] = None  # type: ignore[assignment]
    import onnxruntime
    import torch
    from safetensors.torch import load_file, save_file

    pixels = load_file(work / "inputs.safetensors")["pixel_values"]
    session = onnxruntime.InferenceSession(export / ONNX_FILE, providers=["CPUExecutionProvider"])
    outputs: dict[str, Any] = {}
    for name, images in (("all", pixels), ("one", pixels[:1])):
        (output,) = session.run(None, {"pixel_values": images.numpy()})
        outputs[name] = torch.from_numpy(output).contiguous()
    save_file(outputs, work / "outputs.safetensors")


if __name__ == "__main__":
    block()
    programs = {program.__name__: program for program in (main, write_onnx, run_onnx)}
    programs[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
