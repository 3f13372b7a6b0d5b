"""Simulate runs, each in a process of its own that is forked once everything is imported; print JSON.

Run with the library of `fake_library.py` preloaded: `python simulate.py [NAME …]`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cuda_start  # before DeepSpeed
import deepspeed.moe.layer  # this and the next are imported with the first engine
import deepspeed.runtime.zero.muon.original_muon
from processes import fork_each
from run_case import simulate
from sabotage import SABOTAGES
from simulated_cases import CASES
from tiny import tiny_teacher


def _answer(name: str) -> dict[str, Any]:
    """Return what a run, or a sabotaged one, gives."""
    with tempfile.TemporaryDirectory() as folder:
        if name in CASES:
            return simulate(CASES[name], Path(folder))
        sabotage = SABOTAGES[name]
        place = sabotage.place()
        sabotage.plant()
        return {**simulate(sabotage.case, Path(folder)), "place": place, "kind": sabotage.kind}


def main() -> None:
    os.dup2(2, 1)  # DeepSpeed prints
    print(f"{cuda_start.ACCELERATOR.device_name()}, DeepSpeed {deepspeed.__version__}")
    tiny_teacher()
    answers = fork_each(sys.argv[1:] or [*CASES, *SABOTAGES], _answer)
    os.write(_OUTPUT, json.dumps(answers).encode())


_OUTPUT = os.dup(1)

if __name__ == "__main__":
    main()
