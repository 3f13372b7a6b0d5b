"""Run a program of this folder with an idle GPU in torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fake_library import build
from launch import ROOT, environment
from torch.utils.cpp_extension import library_paths


def run_preloaded(program: str, **variables: str) -> dict[str, Any]:
    """Return what it prints last, a JSON document."""
    preloaded = {"LD_PRELOAD": str(build()), "LD_LIBRARY_PATH": os.pathsep.join(library_paths())}
    command = [sys.executable, str(Path(__file__).with_name(program))]
    variables = environment(**preloaded, **variables)
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed
