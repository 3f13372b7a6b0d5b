"""Install Triton into a separate folder: torch for CPUs has none, and DeepSpeed uses Triton if it can import it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

VERSIONS = {"2.13": "3.7.1"}
"""The Triton that torch for CUDA requires, by torch version."""


def install() -> Path:
    """Return the folder with the package. It is downloaded once per Python version."""
    short = ".".join(torch.__version__.split(".")[:2])
    assert short in VERSIONS, f"add the Triton of torch {short} to VERSIONS"
    version = VERSIONS[short]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(__file__).parents[2] / ".venv" / "torch_extensions"))
    folder = root / "triton" / f"{version}-{sys.implementation.cache_tag}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / "install.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                target = Path(temporary) / "site"
                options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(target)]
                subprocess.run([sys.executable, "-m", "pip", "install", *options, f"triton=={version}"], check=True)
                target.rename(folder)
    return folder
