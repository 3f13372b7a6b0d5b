"""Calls of the command line, each in a fork of one process: `python attempts.py CALLS.json RESULTS`.

A call is {"arguments": […], "environment": {…}}; RESULTS/NUMBER.json is {"code": …, "text": …, "traceback": …}.
Importing torch, transformers and DeepSpeed costs more than most of what is tried here, so it happens once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from forked import preload

from m3i_scale.cli import main

AT_A_TIME = 2


def attempt(call: dict[str, Any], result: Path) -> None:
    output = io.StringIO()
    code: Any = 0
    trace = None
    os.environ.update(call.get("environment", {}))
    sys.argv = ["m3i-scale", *call["arguments"]]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            code, trace = 1, traceback.format_exc()
    result.write_text(json.dumps({"code": code, "text": output.getvalue(), "traceback": trace}))


def run_all(calls: list[dict[str, Any]], results: Path) -> None:
    running = 0
    for number, call in enumerate(calls):
        if running == AT_A_TIME or call.get("alone"):
            for _ in range(running if call.get("alone") else 1):
                os.wait()
                running -= 1
        if os.fork() == 0:
            attempt(call, results / f"{number}.json")
            os._exit(0)
        running += 1
    for _ in range(running):
        os.wait()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    faulthandler.enable()  # ranks do; the streams of a call have no file for it
    preload()
    run_all(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
