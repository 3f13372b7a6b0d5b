"""Run a program of this folder with the fake-CUDA library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fake_library import build
from launch import ROOT, environment
from torch.utils.cpp_extension import library_paths


def run_preloaded(
    program: str, paths: Sequence[Path] = (), arguments: Sequence[str] = (), **variables: str
) -> dict[str, Any]:
    """Run a program and return the JSON of its last line.

    Args:
        program: a file of this folder.
        paths: more folders to import from.
        arguments: of the program.
        variables: environment variables.
    """
    preloaded = {"LD_PRELOAD": str(build()), "LD_LIBRARY_PATH": os.pathsep.join(library_paths())}
    inherited = environment(**preloaded, **variables)
    inherited["PYTHONPATH"] = os.pathsep.join([inherited["PYTHONPATH"], *map(str, paths)])
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    done = subprocess.run(command, env=inherited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout, done.stderr[-4000:]
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document
