"""Jobs to render, and programs that say what they were given."""

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from m3i_scale.config import RunConfig, load_run, run_values
from m3i_scale.launch.description import Cluster
from m3i_scale.launch.job import Job, make_job

OUTPUT = "/output/first"
TWO_HOSTS = {"hosts": ("node1 slots=2", "node2 slots=2"), "master_address": "10.0.0.1"}
COUNTED = {"nodes": 2, "ranks_per_node": 2}
FIELDS = {
    "local": {"ranks_per_node": 2},
    "deepspeed": TWO_HOSTS,
    "slurm": COUNTED,
    "torchrun": TWO_HOSTS,
    "elastic": TWO_HOSTS,
    "kubeflow": {**COUNTED, "container_image": "registry.example.org/m3i:1"},
}
"""What every launcher is told at least."""


@cache
def _run(*overrides: str) -> tuple[RunConfig, dict[str, Any]]:
    return load_run("m3i", list(overrides)), run_values("m3i", list(overrides))


def a_job(*overrides: str, output_dir: str = OUTPUT, **fields: object) -> Job:
    overrides = (f"output_dir={output_dir}", *overrides)
    config, values = _run(*overrides)
    return make_job(config, "m3i", overrides, Cluster.model_validate(fields), values, os.environ)


class Teller:
    """A program that notes its arguments and its environment, in place of a rank's Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "python-teller"
        self._told = folder / "told.jsonl"
        a_script(
            folder,
            self.program.name,
            "import json, os, sys\n"
            f"with open({str(self._told)!r}, 'a') as told:\n"
            "    told.write(json.dumps([sys.argv[1:], dict(os.environ)]) + '\\n')\n",
            f"{sys.executable} -ES",
        )

    def take(self) -> list[tuple[list[str], dict[str, str]]]:
        """Arguments and environment of every start since the last call."""
        lines = self._told.read_text().splitlines() if self._told.exists() else []
        self._told.unlink(missing_ok=True)
        return [(arguments, environment) for arguments, environment in map(json.loads, lines)]


def a_script(folder: Path, name: str, text: str, interpreter: str = "/bin/bash") -> None:
    """A program for PATH."""
    path = folder / name
    path.write_text(f"#!{interpreter}\n{text}\n")
    path.chmod(0o755)


def path_with(folder: Path) -> str:
    return os.pathsep.join([str(folder), os.environ["PATH"]])
