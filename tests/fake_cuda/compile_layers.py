"""Compile the layers of every family for an H100 that is not there, and print what was compiled, as JSON.

Run with the library of `fake_library.py` preloaded and Triton on the path: `python compile_layers.py [NAME …]`.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import compiler
import device_api
import torch
from answers import without_values
from attention import gpu_attention
from tiny import LABEL_SETS, VOCABULARY, random_batch
from torch import nn
from torch._inductor import async_compile
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from m3i_scale.config import load_run
from m3i_scale.objective.build import build_objective
from m3i_scale.scale import compilation
from m3i_scale.scale.activations import apply_activation_checkpointing, policy_of_switches, stacks

_TWO = "{num_hidden_layers: 2}"
_M3I = ("m3i", f"backbone.config={_TWO}", f"text.config={_TWO}")
CASES: dict[str, tuple[str, ...]] = {
    "m3i": _M3I,
    "m3i, selective": (*_M3I, "backbone.activation_checkpointing=selective"),
    **{
        preset: ("supervised", f"backbone.preset={preset}", f"backbone.config={_TWO}")
        for preset in ("clip-b/16", "siglip-b/16", "dinov2-g/14", "dinov2-reg-b/14", "dinov3-b/16", "dinov3-h+/16")
    },
    "internimage-t": ("supervised", "backbone.preset=internimage-t", "backbone.config={depths: [1, 1, 1, 1]}"),
}


def compiled(name: str) -> dict[str, Any]:
    """Return the classes of layers of a model, and how many kernels were compiled for a micro-batch."""
    run = load_run(*CASES[name][:1], [*CASES[name][1:]])
    batch = random_batch(32, image=run.backbone.config.get("image_size", 224))
    torch._dynamo.reset()
    compiler.asked_for.clear()
    with FakeTensorMode(allow_non_fake_inputs=True), without_values():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                objective = build_objective(run, LABEL_SETS, VOCABULARY if "text" in run.model_fields_set else None)
        finally:
            torch.set_default_dtype(torch.float32)
        policy = run.backbone.activation_checkpointing
        layers = {type(layer).__name__ for stack in stacks(objective) for _, layer in stack}
        compilation.compile_layers(objective.train(), policy)
        apply_activation_checkpointing(objective, policy_of_switches(policy, compiled=True))
        with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", gpu_attention):
            loss, _ = objective(batch.to("cuda"))
            loss.backward()
    return {"layers": sorted(layers), "kernels": len(compiler.asked_for)}


class Branching(GradientCheckpointingLayer):
    """A layer whose path depends on values, which one graph cannot hold."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + 1 if states.sum() > 0 else states


class Adding(GradientCheckpointingLayer):
    """A layer of one kernel."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + 1


def planted(layer: nn.Module) -> str:
    """Return the error that compiling a layer ends with."""
    with FakeTensorMode():
        compilation.compile_layers(nn.Sequential(nn.ModuleList([layer])))
        try:
            layer(torch.ones(4, 8, device="cuda"))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "none"


def _wrong_kernel(name: str, source: str) -> Any:
    return async_compile._load_triton_kernel_from_source(name, source.replace("tl.store", "tl.stow"))


def main() -> None:
    device_api.install()
    compiler.install()
    compile_by = partial(torch.compile, backend=compiler.backend)
    with mock.patch.object(compilation.torch, "compile", compile_by):
        models = {name: compiled(name) for name in sys.argv[1:] or CASES}
        faults = {"branches": planted(Branching())}
        with mock.patch.object(compiler, "load_kernel", _wrong_kernel):
            faults["has a wrong kernel"] = planted(Adding())
    print(json.dumps({"models": models, "planted": faults}))


if __name__ == "__main__":
    main()
