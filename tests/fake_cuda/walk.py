"""Walk through one micro-batch of every model on a GPU that does nothing, and print what it asks of it, as JSON.

Run with the library of `fake_library.py` preloaded: `python walk.py [NAME …]`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import yaml
from answers import without_values
from processes import fork_each
from tiny import DINOV2, LABEL_SETS, MAPS, MULTI_CROP, RECIPES, VOCABULARY, random_batch, tiny_run, tiny_teacher
from torch._subclasses.fake_tensor import FakeTensorMode
from tracer import Tracer

from m3i_scale.config import RunConfig, load_run
from m3i_scale.data.batch import Batch
from m3i_scale.objective.build import build_objective

_VIT = {"image_size": 64, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
_BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {"preset": "vit-ti/16", "config": _VIT | {"intermediate_size": 128}},
    "dinov2": {"preset": "dinov2-s/14", "config": _VIT | {"mlp_ratio": 2}},
    "internimage": {
        "preset": "internimage-t",
        "config": {"image_size": 64, "channels": 16, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8]},
    },
}
_REGIONS = {"anchors_per_image": 64, "before_nms": [100, 100], "after_nms": [50, 50], "per_image": 32}
_MASK_RCNN = {
    "kind": "mask_rcnn",
    "channels": 16,
    "box_width": 32,
    "box_convs": 1,
    "mask_convs": 1,
    "regions": _REGIONS | {"sizes": [8, 16, 32, 48, 64]},
}
_RFDETR = {
    "kind": "rfdetr",
    "channels": 32,
    "queries": 8,
    "groups": 3,
    "decoder_layers": 2,
    "self_attention_heads": 2,
    "cross_attention_heads": 4,
    "decoder_width": 64,
}
_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "classifier": ("vit", {"kind": "classification"}),
    "linear segmenter": ("vit", {"kind": "segmentation", "head": "linear"}),
    "UPerNet": ("vit", {"kind": "segmentation", "head": {"kind": "upernet", "channels": 32}}),
    "UPerNet on maps": ("internimage", {"kind": "segmentation", "head": {"kind": "upernet", "channels": 32}}),
    "EoMT": ("vit", {"kind": "segmentation", "head": {"kind": "eomt", "queries": 7, "blocks": 2, "points": 200}}),
    "Mask R-CNN": ("vit", {"kind": "detection", "head": _MASK_RCNN | {"windows": {"size": 3}}}),
    "Mask R-CNN on maps": ("internimage", {"kind": "detection", "head": _MASK_RCNN}),
    "RF-DETR": ("dinov2", {"kind": "detection", "head": _RFDETR | {"masks": False}}),
}
_RUNS: dict[str, tuple[str, ...]] = {name: (name,) for name in RECIPES} | {
    "m3i, mixed attention": ("m3i", "backbone.attention=across_images"),
    "m3i on CLIP": ("m3i", "backbone.preset=clip-b/16"),
    "m3i on maps": ("m3i", *MAPS, "backbone.attention=across_images"),
    "m3i, learned balance": ("m3i", "recipe.balance={kind: learned}"),
    "m3i, gradient norms": ("m3i", "recipe.balance={kind: gradient_norm}"),
    "sim on DINOv2": ("sim", *DINOV2),
    "multi-crop on CLIP": ("global_distillation", *MULTI_CROP, "backbone.preset=clip-b/16"),
}

_LOGGED = ("m3i", "byol", "sim_global")


def run_of(name: str, *overrides: str) -> RunConfig:
    """Return the run of a recipe or task."""
    if name in _RUNS:
        return tiny_run(*_RUNS[name], *overrides)
    backbone, task = _TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump({"task": task, "backbone": _BACKBONES[backbone]}))
        return load_run(str(file), [*overrides])


def batch_of(run: RunConfig, image: int, count: int = 4) -> Batch:
    """Return samples with everything that the run reads, among it two objects an image."""
    batch = random_batch(count, image=image)
    if run.task is None or run.task.kind == "classification":
        return batch
    if run.task.kind == "segmentation":
        return replace(batch, masks_BHW=torch.zeros(count, image, image, dtype=torch.uint8))
    return replace(
        batch,
        boxes_BN4=torch.tensor([4.0, 4.0, 30.0, 30.0]).expand(count, 2, 4),
        box_labels_BN=torch.zeros(count, 2, dtype=torch.int64),
        box_masks_BNMM=torch.ones(count, 2, 28, 28, dtype=torch.uint8),
    )


def counted(name: str, *, logged: bool) -> dict[str, Any]:
    """Return kernels and waits of a micro-batch; of a logged one with its figures."""
    run = run_of(name)
    labels = {"shapes": LABEL_SETS["shapes"]} if run.task is not None else LABEL_SETS
    vocabulary = VOCABULARY if "text" in run.model_fields_set else None
    batch = batch_of(run, run.backbone.config["image_size"])
    with FakeTensorMode(allow_non_fake_inputs=True), without_values():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                objective = build_objective(run, labels, vocabulary).train()
        finally:
            torch.set_default_dtype(torch.float32)
        objective.measure_health = logged
        there = batch.to("cuda")
        with Tracer() as tracer:
            loss, figures = objective(there)
            loss.backward()
            objective.after_backward()
            objective.host_figures.copy()()
        elsewhere = [name for name, value in {"loss": loss, **figures}.items() if not value.is_cuda]
    return {"kernels": tracer.kernels, "waits": dict(tracer.waits), "elsewhere": elsewhere}


def planted() -> dict[str, dict[str, Any]]:
    """Return what is counted of operations that are known to wait, and of some that are not."""
    with FakeTensorMode():
        x, mask, index = torch.ones(4, device="cuda"), torch.ones(4, device="cuda") > 0, torch.arange(2)
        places = {
            "reads a value": lambda: float(x.sum()),
            "counts a mask": lambda: x[mask],
            "asks for places": x.nonzero,
            "sends values": lambda: torch.tensor([1.0, 2.0], device="cuda"),
            "fetches values": x.cpu,
            "sends an index": lambda: x[index],
            "sends a number": lambda: x.where(mask, torch.tensor(0.0)),
            "decomposes": lambda: torch.linalg.eigh(x.diag()),
            "fills by a mask": lambda: x.masked_fill(mask, 0.0),
            "fills by an index": lambda: x.clone().__setitem__(mask, 0.0),
            "sends beside the step": lambda: index.to("cuda", non_blocking=True),
            "chooses a number": lambda: x.where(mask, 0.0),
            "adds a number": lambda: x + 1.0,
        }
        found: dict[str, dict[str, Any]] = {}
        for name, operation in places.items():
            with Tracer() as tracer:
                operation()
            found[name] = {"waits": tracer.waits.total(), "kernels": tracer.kernels}
        try:
            x + torch.ones(4)
        except RuntimeError as error:
            found["mixes devices"] = {"refused": "cuda" in str(error)}
    return found


def _half(numbers: str) -> dict[str, Any]:
    """Return what is counted of the models with these numbers, `[first, …]`."""
    names = [_names()[number] for number in json.loads(numbers)]
    models = {name: counted(name, logged=False) for name in names}
    return models | {f"{name}, logged": counted(name, logged=True) for name in names if name in _LOGGED}


def _names() -> list[str]:
    return sys.argv[1:] or [*_RUNS, *_TASKS]


def main() -> None:
    tiny_teacher()
    numbers = range(len(_names()))
    halves = fork_each([json.dumps([*numbers[first::2]]) for first in (0, 1)], _half)
    models: dict[str, Any] = {}
    for half in halves.values():
        if "error" in half:
            raise RuntimeError(half["error"])
        models |= half
    print(json.dumps({"models": models, "planted": planted()}))


if __name__ == "__main__":
    main()
