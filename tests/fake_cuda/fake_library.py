"""Build the library that puts an idle GPU into a build of torch for CPUs; print where it lies."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

_SOURCE = Path(__file__).with_name("guard.cpp")


def build() -> Path:
    """Return the library, compiled where it is not there for this source and this torch."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(__file__).parents[2] / ".venv" / "torch_extensions"))
    version = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = root / "fake_cuda" / f"libfakecuda-{version}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        half = library.with_suffix(f".{os.getpid()}")  # two test runs may build at a time
        command = [os.environ.get("CXX", "g++"), "-O1", "-shared", "-fPIC", "-std=c++20", str(_SOURCE), "-o", str(half)]
        command += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
        subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
        half.rename(library)
    return library


if __name__ == "__main__":
    print(build())
