"""What a step takes of this host by ZeRO stage and number of ranks, as `host_time.py` measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from _rows import Rows

RANKS = {"cuda": (1, 64), "cpu": (1, 2)}
STAGES = (1, 3)
HOST_TIME = Path(__file__).resolve().parent.parent / "host_time.py"


def measure(mode: str, rows: Rows) -> None:
    """Figures: milliseconds of a micro-batch."""
    for stage in STAGES:
        for ranks in RANKS[mode]:
            command = [sys.executable, str(HOST_TIME), "--json", "--steps", "3"]
            command += ["--ranks", str(ranks), "--stages", str(stage)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            (case,) = json.loads(done.stdout)["cases"]
            rows.figure(f"ZeRO-{stage}, {ranks} ranks", case)
