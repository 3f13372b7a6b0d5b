"""Install Triton into a folder of its own: torch for CPUs has none, and DeepSpeed would use it if it were there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VERSION = "3.7.1"
"""That of torch 2.13 for CUDA."""


def install() -> Path:
    """Return the folder with the package, which is downloaded once."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(__file__).parents[2] / ".venv" / "torch_extensions"))
    folder = root / "triton" / VERSION
    if not folder.exists():
        half = folder.with_suffix(f".{os.getpid()}")
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(half)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, f"triton=={VERSION}"], check=True)
        half.rename(folder)
    return folder
