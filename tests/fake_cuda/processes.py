"""Run functions in forked processes, two at a time: imports take longer than most of them."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

AT_A_TIME = 2


def fork_each(names: Sequence[str], function: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the results of `function` by name. Call it before the first backward pass: autograd's threads do not
    survive a fork.

    Args:
        names: of the calls.
        function: returns JSON. What it raises is the result, as `{"error": traceback}`.
    """
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{number}.json" for number, name in enumerate(names)}
        running = 0
        for name, file in files.items():
            if running == AT_A_TIME:
                os.wait()
                running -= 1
            _fork(name, function, file)
            running += 1
        for _ in range(running):
            os.wait()
        killed = {"error": "the process was killed"}
        return {name: json.loads(file.read_text()) if file.exists() else killed for name, file in files.items()}


def _fork(name: str, function: Callable[[str], dict[str, Any]], file: Path) -> None:
    if os.fork():
        return
    try:
        result = function(name)
    except BaseException:
        result = {"error": traceback.format_exc()}
    file.write_text(json.dumps(result))
    os._exit(0)  # without what the parent does at its exit
