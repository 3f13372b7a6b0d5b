"""The notebook runs from its first cell to its last, and is committed without what it printed."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from launch import ROOT
from nbclient import NotebookClient
from traitlets.config import Config

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "examples" / "notebook" / "shards_to_pictures.ipynb"


def test_the_notebook_ends_with_its_pictures(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    # Sockets in a folder: ports could be taken by others before the kernel listens there.
    sockets = Config({"KernelManager": {"transport": "ipc", "ip": str(tmp_path / "kernel")}})
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=1800, startup_timeout=600, config=sockets, resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    lines = [line for output in outputs for line in output.get("text", "").splitlines() if line.startswith("step")]
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert last < first
