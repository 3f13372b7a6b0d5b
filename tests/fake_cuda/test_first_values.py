"""A model for a GPU is built on it, and its first values are drawn on the CPU: the same ones on every device."""

from __future__ import annotations

import pytest
import torch
from preloaded import run_preloaded

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has a GPU's own library")


def test_models_are_built_on_the_gpu_and_drawn_on_the_cpu() -> None:
    models = run_preloaded("first_values.py")
    assert models == {
        name: {"built": ["cuda"], "drawn": ["cpu"], "initialized": ["cuda"]} for name in ("vit", "dinov2")
    }
