"""Isolated Python process without this package and without network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from m3i_scale.errors import ExportError

TIMEOUT_S = 3_600.0
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_NOT_PASSED_ON = ("PYTHONPATH", "PYTHONHOME", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def run_fresh(arguments: list[str], folder: Path, work: Path) -> None:
    """Run a Python file with its arguments in an isolated process in `work`. Modeling files are copied there before
    they run, never into the user's cache. Messages name `folder`, the export."""
    inherited = {key: value for key, value in os.environ.items() if key not in _NOT_PASSED_ON}
    environment = inherited | _OFFLINE | {"HF_MODULES_CACHE": str(work / "modules")}
    # The same thread count as here: another summation order may swap objects with nearly equal scores.
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    try:
        done = subprocess.run(
            [sys.executable, "-I", *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
            cwd=work,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"the fresh process did not load the export within {TIMEOUT_S:g} s", where=str(folder)
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ExportError(
            f"a fresh process cannot load the export: {lines[-1]}", where=str(folder), why="\n".join(lines[-12:-1])
        )
