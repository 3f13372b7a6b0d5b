"""Run in a fresh, isolated Python: load an export with stock classes alone and write down what came of it.

    python -I fresh.py EXPORT WORK

Read: `WORK/inputs.safetensors` (pixel values), `WORK/captions.json`, `WORK/*.png`.
Written: `WORK/outputs.safetensors`, `WORK/report.json`.

This file is run by its path, imports nothing of the package, and makes sure that nothing it loads does.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

BLOCKED = ("m3i_scale", "deepspeed")
"""What the training side has installed and a user of the export need not have."""


ZERO_AT_FIRST = (".dcn.offset.weight", ".dcn.mask.weight", ".dcn.center_feature_scale_proj_weight")
"""Matrices that a model starts at zero on purpose: they are so in first weights."""


def block() -> None:
    """Let the training side's packages look as if they were not installed; an import of them fails from here on."""
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]


def fingerprint(tensor: Any) -> str:
    """SHA-256 over type, shape and bytes of a tensor."""
    import torch

    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def inspect_files(folder: Path) -> dict[str, Any]:
    """Types and fingerprints of all tensors in the folder's safetensors, and those that no training leaves behind."""
    import torch
    from safetensors import safe_open

    found: dict[str, Any] = {"dtypes": set(), "fingerprints": {}, "faults": []}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                found["fingerprints"][name] = fingerprint(tensor)
                found["dtypes"].add(str(tensor.dtype).removeprefix("torch."))
                if tensor.numel() == 0:
                    found["faults"].append(f"{name}: no elements, shape {list(tensor.shape)}")
                elif not torch.isfinite(tensor).all():
                    found["faults"].append(f"{name}: values that are not finite")
                elif _is_one_value(tensor) and not (name.endswith(ZERO_AT_FIRST) and tensor.reshape(-1)[0] == 0):
                    found["faults"].append(
                        f"{name}: all values are {tensor.reshape(-1)[0].item():g}, never initialised"
                    )
    found["dtypes"] = sorted(found["dtypes"])
    return found


def _is_one_value(tensor: Any) -> bool:
    """Whether a matrix holds one value everywhere; vectors may."""
    return sum(side > 1 for side in tensor.shape) > 1 and bool((tensor == tensor.reshape(-1)[0]).all())


def load(folder: Path, **kwargs: Any) -> tuple[Any, dict[str, list[str]]]:
    """A model by `AutoModel` and what its loading reported. Code runs from the folder only where it was put there."""
    from transformers import AutoModel

    own = (folder / "config.json").is_file() and "auto_map" in json.loads((folder / "config.json").read_text("utf-8"))
    model, info = AutoModel.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, trust_remote_code=own, dtype="auto", **kwargs
    )
    return model.eval(), {key: sorted(map(str, value)) for key, value in info.items()}


def examine(folder: Path, inputs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Load one model twice: as anyone would, and without the pooling layer, which no pre-training trains."""
    import torch

    report = inspect_files(folder)
    report["config_dtype"] = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    if report["faults"]:
        return report, None
    plain, report["plain"] = load(folder)
    takes = inspect.signature(type(plain).__init__).parameters
    model, report["strict"] = load(folder, **{"add_pooling_layer": False} if "add_pooling_layer" in takes else {})
    report["class"] = type(model).__name__
    report["loaded_dtype"] = str(model.dtype).removeprefix("torch.")
    report["loaded"] = {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        hidden = model.float()(**inputs).last_hidden_state
    return report, hidden.contiguous()


def main(export: Path, work: Path) -> None:
    """See the module."""
    from PIL import Image
    from safetensors.torch import load_file, save_file
    from transformers import AutoImageProcessor, AutoTokenizer

    outputs = {}
    processor = AutoImageProcessor.from_pretrained(export, local_files_only=True)
    for path in sorted(work.glob("*.png")):
        with Image.open(path) as image:
            outputs[f"pixels.{path.stem}"] = processor(image, return_tensors="pt")["pixel_values"].contiguous()
    report: dict[str, Any] = {"processor": type(processor).__name__, "models": {}}
    report["models"]["vision"], hidden = examine(export, load_file(work / "inputs.safetensors"))
    if hidden is not None:
        outputs["hidden.vision"] = hidden
    if (export / "text").is_dir():
        captions = json.loads((work / "captions.json").read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(export / "text", local_files_only=True)
        tokens = dict(tokenizer(captions, padding=True, truncation=True, return_tensors="pt"))
        outputs["tokens"] = tokens["input_ids"].contiguous()
        wanted = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        report["models"]["text"], hidden = examine(export / "text", wanted)
        if hidden is not None:
            outputs["hidden.text"] = hidden
    report["heads"] = inspect_files(export / "heads")
    report["needed"] = [name for name in BLOCKED if sys.modules.get(name) is not None]
    save_file(outputs, work / "outputs.safetensors")
    (work / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    block()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
