"""The host's time of a step is measured with ranks that are not there, whose engine steps all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench
SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "host_time.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), "--json", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_phase_of_a_step_of_many_ranks_is_measured():
    done = run("--ranks", "8", "--stages", "3", "--steps", "1", "--all-reduces")
    assert done.returncode == 0, done.stderr[-3000:]
    (case,) = json.loads(done.stdout)["cases"]
    assert (case["deepspeed"], case["ranks"]) == ("zero3_bf16_all_reduce", 8)
    phases = [case[phase] for phase in ("forward", "backward", "step", "momentum")]
    assert min(phases) > 0
    assert case["total"] == pytest.approx(sum(phases))


def test_a_stage_that_is_none_is_refused():
    done = run("--stages", "4")
    assert done.returncode == 2
    assert done.stdout == ""
