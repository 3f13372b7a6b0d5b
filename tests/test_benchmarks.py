"""Benchmarks keep standard output for their one JSON document."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize("name", ["step", "resume", "recipes", "one_stage"])
def test_what_libraries_print_goes_elsewhere(name):
    script = f"import {name}, os; os.system('echo from a child'); print('from a library'); {name}.emit({{'a': 1}})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"a": 1}
    assert "from a library" in done.stderr
