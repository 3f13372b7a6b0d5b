"""Compile the layers of every backbone family for an H100, without a GPU, and print the graphs as JSON.

Run with the library of `fake_library.py` preloaded and Triton on the path: `python compile_layers.py [NAME …]`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
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
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from m3i_scale.backbones.internimage import modeling_internimage
from m3i_scale.config import load_run
from m3i_scale.engine import compilation
from m3i_scale.engine.activations import apply_activation_checkpointing, policy_of_switches
from m3i_scale.objective.build import build_objective

_TWO = "{num_hidden_layers: 2}"
_M3I = ("m3i", f"backbone.config={_TWO}", f"text.config={_TWO}")
_VITS = ("clip-b/16", "siglip-b/16", "dinov2-g/14", "dinov2-reg-b/14", "dinov3-b/16", "dinov3-h+/16")
_SHALLOW = "depths: [1, 1, 1, 1]"
CASES: dict[str, tuple[str, ...]] = {
    "m3i": _M3I,
    "m3i, selective": (*_M3I, "backbone.activation_checkpointing=selective"),
    **{name: ("supervised", f"backbone.preset={name}", f"backbone.config={_TWO}") for name in _VITS},
    # The published sizes differ in their norms, and the large ones have more of them.
    "internimage-t": ("supervised", "backbone.preset=internimage-t", f"backbone.config={{{_SHALLOW}}}"),
    "internimage-b": ("supervised", "backbone.preset=internimage-b", f"backbone.config={{{_SHALLOW}}}"),
    "internimage-h": (
        "supervised",
        "backbone.preset=internimage-h",
        f"backbone.config={{{_SHALLOW}, level2_post_norm_block_ids: [0]}}",
    ),
}


def compile_model(name: str) -> list[dict[str, Any]]:
    """Return the graphs of the layers in a bf16 micro-batch of 32 images, forward and backward."""
    recipe, *overrides = CASES[name]
    run = load_run(recipe, overrides)
    policy = run.backbone.activation_checkpointing
    batch = random_batch(32, image=224)
    torch._dynamo.reset()
    compiler.graphs.clear()
    with FakeTensorMode(allow_non_fake_inputs=True), without_values(), _stochastic_depth(), _kernels_of_a_gpu():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                objective = build_objective(run, LABEL_SETS, VOCABULARY if "text" in run.model_fields_set else None)
        finally:
            torch.set_default_dtype(torch.float32)
        compilation.compile_layers(objective.train(), policy)
        apply_activation_checkpointing(objective, policy_of_switches(policy, compiled=True))
        loss, _ = objective(batch.to("cuda"))
        loss.backward()
    return [asdict(graph) for graph in compiler.graphs]


def _stochastic_depth() -> Any:
    return mock.patch.object(modeling_internimage, "_drop_paths", lambda config: [0.1] * sum(config.depths))


def _kernels_of_a_gpu() -> Any:
    return mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", gpu_attention)


class Branching(GradientCheckpointingLayer):
    """A layer whose path depends on values, which one graph cannot hold."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + 1 if states.sum() > 0 else states


class Adding(GradientCheckpointingLayer):
    """A layer with one kernel."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + 1


def error_of_layer(layer: nn.Module) -> str:
    """Return the error that compiling a layer ends with, or `none`."""
    with FakeTensorMode():
        compilation.compile_layers(nn.Sequential(nn.ModuleList([layer])))
        try:
            layer(torch.ones(4, 8, device="cuda"))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "none"


def _load_wrong_kernel(name: str, source: str, load: Any = compiler.load_kernel) -> Any:
    return load(name, source.replace("tl.store", "tl.stow"))


def main() -> None:
    device_api.install()
    compiler.install()
    with mock.patch.object(compilation.torch, "compile", compiler.compile_function):
        models = {name: compile_model(name) for name in sys.argv[1:] or CASES}
        errors = {"branching": error_of_layer(Branching()), "adding": error_of_layer(Adding())}
        torch._dynamo.reset()
        with mock.patch.object(compiler, "load_kernel", _load_wrong_kernel):
            compiler.clear()
            errors["wrong kernel"] = error_of_layer(Adding())
    print(json.dumps({"models": models, "errors": errors}))


if __name__ == "__main__":
    main()
