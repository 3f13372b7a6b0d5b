"""A model for a GPU is built on it, and its first values are drawn on the CPU: the same ones on every device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_library import build
from launch import ROOT, environment
from torch.utils.cpp_extension import library_paths

SCRIPT = Path(__file__).with_name("first_values.py")

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has a GPU's own library")


def test_models_are_built_on_the_gpu_and_drawn_on_the_cpu() -> None:
    preloaded = {"LD_PRELOAD": str(build()), "LD_LIBRARY_PATH": os.pathsep.join(library_paths())}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment(**preloaded), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    models = json.loads(done.stdout.splitlines()[-1])
    assert models == {
        name: {"built": ["cuda"], "drawn": ["cpu"], "initialized": ["cuda"]} for name in ("vit", "dinov2")
    }
