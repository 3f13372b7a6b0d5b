"""Run one section of gpu.py in this process: `_run.py NAME MODE ROWS`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from _rows import Rows

if __name__ == "__main__":
    name, mode, rows = sys.argv[1:]
    importlib.import_module(f"gpu_sections.{name}").measure(mode, Rows(Path(rows)))
