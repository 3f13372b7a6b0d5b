"""Layers that `backbone.compile` compiles become machine code of an H100, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent / "fake_cuda"))

from preloaded import run_preloaded
from triton_library import install

from m3i_scale.backbones.families import FAMILIES, preset_config

pytestmark = [
    pytest.mark.bench,  # minutes; compiled layers are off by default
    pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has a GPU's own library"),
]
LAYERS = {
    "m3i": ["BertLayer", "ViTLayer"],
    "m3i, selective": ["BertLayer", "ViTLayer"],
    "clip-b/16": ["CLIPEncoderLayer"],
    "siglip-b/16": ["SiglipEncoderLayer"],
    "dinov2-g/14": ["Dinov2Layer"],
    "dinov2-reg-b/14": ["Dinov2WithRegistersLayer"],
    "dinov3-b/16": ["DINOv3ViTLayer"],
    "dinov3-h+/16": ["DINOv3ViTLayer"],
    "internimage-t": ["InternImageLayer"],
    "internimage-b": ["InternImageLayer"],
    "internimage-h": ["InternImageLayer"],
}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("caches")
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    return run_preloaded("compile_layers.py", [install()], **caches)


def graphs_of(document: dict[str, Any], name: str, layer: str, *, is_backward: bool) -> list[dict[str, Any]]:
    graphs = document["models"][name]
    return [graph for graph in graphs if (graph["layer"], graph["is_backward"]) == (layer, is_backward)]


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_compiles_forward_and_backward(document: dict[str, Any], name: str) -> None:
    assert sorted({graph["layer"] for graph in document["models"][name]}) == LAYERS[name]
    for layer in LAYERS[name]:
        for is_backward in (False, True):
            graphs = graphs_of(document, name, layer, is_backward=is_backward)
            assert graphs, (layer, is_backward)
            assert all(graph["kernels"] > 0 for graph in graphs)


def test_no_model_is_left_out(document: dict[str, Any]) -> None:
    assert document["models"].keys() == LAYERS.keys()
    families = {type(preset_config(name)) for family in FAMILIES for name in family.presets()}
    compiled = {type(preset_config(name)) for name in LAYERS if not name.startswith("m3i")}
    assert families == compiled | {type(preset_config("vit-b/16"))}  # that of m3i


@pytest.mark.parametrize("layer", LAYERS["m3i"])
def test_selective_saves_fewer_tensors(document: dict[str, Any], layer: str) -> None:
    saved = {
        name: max(graph["outputs"] for graph in graphs_of(document, name, layer, is_backward=False))
        for name in ("m3i", "m3i, selective")
    }
    assert saved["m3i, selective"] < saved["m3i"]


def test_graph_breaks_and_invalid_kernels_fail(document: dict[str, Any]) -> None:
    errors = document["errors"]
    assert errors["adding"] == "none"
    assert "Unsupported" in errors["branching"]
    assert "CompilationError" in errors["wrong kernel"]
