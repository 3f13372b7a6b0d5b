"""Layers that `backbone.compile` compiles become machine code of an H100, without one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent / "fake_cuda"))

from preloaded import run_preloaded
from triton_library import install

pytestmark = pytest.mark.bench

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
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("caches")
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    return run_preloaded("compile_layers.py", PYTHONPATH=str(install()), **caches)


def test_every_family_compiles_without_a_graph_break(compiled: dict[str, Any]) -> None:
    models = compiled["models"]
    assert {name: model["layers"] for name, model in models.items()} == LAYERS
    assert all(model["kernels"] > 0 for model in models.values()), models


def test_what_does_not_compile_is_found(compiled: dict[str, Any]) -> None:
    assert "Unsupported" in compiled["planted"]["branches"]
    assert "CompilationError" in compiled["planted"]["has a wrong kernel"]
