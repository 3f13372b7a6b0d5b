"""The ready-to-edit files in launchers/ are what the renderers make of one example."""

import runpy
import subprocess
from pathlib import Path

import pytest
import yaml

from m3i_scale.launch.launchers import LAUNCHERS

LAUNCHERS_FOLDER = Path(__file__).resolve().parents[2] / "launchers"
READY = runpy.run_path(str(LAUNCHERS_FOLDER / "_ready.py"))["ready_files"]()


@pytest.mark.parametrize("path", READY)
def test_a_ready_file_is_what_the_renderer_makes(path):
    written = (LAUNCHERS_FOLDER / path).read_text(encoding="utf-8")
    assert written == READY[path], "run `python launchers/_ready.py`"


def test_every_launcher_has_one():
    assert {Path(path).parts[0].partition(".")[0] for path in READY} == set(LAUNCHERS)


@pytest.mark.parametrize("path", [path for path in READY if path.endswith((".sh", ".sbatch"))])
def test_a_ready_script_is_one_for_bash(path):
    assert subprocess.run(["bash", "-n", LAUNCHERS_FOLDER / path], check=False).returncode == 0


@pytest.mark.parametrize("path", [path for path in READY if path.endswith(".yaml")])
def test_a_ready_manifest_is_yaml(path):
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(READY[path]))
