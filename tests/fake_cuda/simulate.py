"""Simulate runs, each in a process of its own that is forked once everything is imported; print JSON.

Run with the library of `fake_library.py` preloaded: `python simulate.py [NAME …]`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cuda_start  # before DeepSpeed
import deepspeed.moe.layer  # this and the next are imported with the first engine
import deepspeed.runtime.zero.muon.original_muon
from cases import CASES
from run_case import simulate
from sabotage import SABOTAGES
from tiny import tiny_teacher

AT_A_TIME = 2


def _answer(name: str, folder: Path) -> dict[str, Any]:
    """Return what a run, or a sabotaged one, gives."""
    if name in CASES:
        return simulate(CASES[name], folder)
    sabotage = SABOTAGES[name]
    place = sabotage.place()
    sabotage.plant()
    return {**simulate(sabotage.case, folder), "place": place, "kind": sabotage.kind}


def _fork(name: str, root: Path, number: int) -> int:
    """Start a process that writes its answer into a file, and return its number."""
    process = os.fork()
    if process:
        return process
    try:
        (root / str(number)).mkdir()
        answer = _answer(name, root / str(number))
    except BaseException:
        answer = {"error": traceback.format_exc()}
    (root / f"{number}.json").write_text(json.dumps(answer))
    os._exit(0)


def main() -> None:
    os.dup2(2, 1)  # DeepSpeed prints
    print(f"{cuda_start.ACCELERATOR.device_name()}, {deepspeed.__version__}")
    tiny_teacher()
    names = sys.argv[1:] or [*CASES, *SABOTAGES]
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        root, running = Path(folder), 0
        for number, name in enumerate(names):
            if running == AT_A_TIME:
                os.wait()
                running -= 1
            _fork(name, root, number)
            running += 1
        for _ in range(running):
            os.wait()
        files = {name: root / f"{number}.json" for number, name in enumerate(names)}
        answers = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    os.write(_OUTPUT, json.dumps(answers).encode())


_OUTPUT = os.dup(1)

if __name__ == "__main__":
    main()
