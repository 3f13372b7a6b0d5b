"""Script for a fresh, isolated Python process. `trace` writes an export's model as ONNX, `run` runs the ONNX file.

    python -I fresh_onnx.py trace|run EXPORT WORK

Reads: `WORK/job.json`, `WORK/inputs.safetensors`. Writes: `EXPORT/model.onnx`; `run` writes `WORK/outputs.safetensors`.
`run` imports neither `transformers` nor this package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FILE = "model.onnx"


def trace(export: Path, work: Path) -> None:
    """Write the ONNX file."""
    import torch
    import transformers
    from safetensors.torch import load_file

    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    has_code = "auto_map" in json.loads((export / "config.json").read_text(encoding="utf-8"))
    model = getattr(transformers, job["auto"]).from_pretrained(
        str(export), local_files_only=True, trust_remote_code=has_code, dtype=torch.float32, **job["options"]
    )
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
        export / FILE,
        input_names=["pixel_values"],
        output_names=[name],
        external_data=False,
        dynamo=True,
        verbose=False,
    )


def run(export: Path, work: Path) -> None:
    """Run the ONNX file on all images in one batch, and on the first image alone."""
    import onnxruntime
    import torch
    from safetensors.torch import load_file, save_file

    pixels = load_file(work / "inputs.safetensors")["pixel_values"]
    session = onnxruntime.InferenceSession(export / FILE, providers=["CPUExecutionProvider"])
    outputs: dict[str, Any] = {}
    for name, images in (("all", pixels), ("one", pixels[:1])):
        (output,) = session.run(None, {"pixel_values": images.numpy()})
        outputs[name] = torch.from_numpy(output).contiguous()
    save_file(outputs, work / "outputs.safetensors")


if __name__ == "__main__":
    for blocked in ("m3i_scale", "deepspeed", *(("transformers",) if sys.argv[1] == "run" else ())):
        sys.modules[blocked] = None  # type: ignore[assignment]
    (trace if sys.argv[1] == "trace" else run)(Path(sys.argv[2]), Path(sys.argv[3]))
