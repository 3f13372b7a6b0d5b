"""What a step takes of the host beside the arithmetic, by ZeRO stage and number of ranks.

A ViT of 40 layers, a BERT of 12 and a decoder of 4, 64 channels wide, train with the recipe `m3i`: the layers of a
billion parameters, whose hooks, loops over ranks and launches cost what they cost there, and next to no arithmetic.
The process group is torch's fake one: rank 0 of many, whose collectives return at once. Buckets are scaled with the
width, so that a step has as many collectives as one of ViT-g/14. Counted is the processor time of one thread.

python benchmarks/host_time.py --json
python benchmarks/host_time.py --json --ranks 8 --ranks 64 --stages 3 --hpz 8
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer
from _common import emit, machine, say

RANKS, STAGES = (1, 8, 64, 512), (1, 2, 3)
_ONE_STEP = 256
"""From so many ranks on one step is measured, which takes seconds."""


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    ranks: list[int] = typer.Option(RANKS, min=1, help="Numbers of ranks."),
    stages: list[int] = typer.Option(STAGES, min=1, max=3, help="ZeRO stages."),
    hpz: int = typer.Option(1, min=1, help="zero_hpz_partition_size, under stage 3."),
    all_reduces: bool = typer.Option(False, help="Under stage 3 the file zero3_bf16_all_reduce."),
    steps: int = typer.Option(5, min=1, help="Steps that are measured."),
) -> None:
    """Print {cases: [{deepspeed, ranks, settings, forward, …, total}]}, in ms by phase, and the machine."""
    settings: dict[str, Any] = {"zero_hpz_partition_size": hpz} if hpz > 1 else {}
    files = {stage: f"zero{stage}_bf16" for stage in stages}
    if all_reduces and 3 in files:
        files[3] = "zero3_bf16_all_reduce"
    cases = [
        _case(file, count, settings if stage == 3 else {}, steps) for stage, file in files.items() for count in ranks
    ]
    emit({"cases": cases, "machine": machine()})


def _case(file: str, ranks: int, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    case = {"deepspeed": file, "ranks": ranks, "steps": 1 if ranks >= _ONE_STEP else steps, "settings": settings}
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "found.json"
        script = str(Path(__file__).with_name("_host_rank.py"))
        done = subprocess.run(
            [sys.executable, script, json.dumps(case), str(written)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{file} on {ranks} ranks did not train:\n{(done.stdout + done.stderr)[-4000:]}")
        found: dict[str, float] = json.loads(written.read_text())
    total = sum(found.values())
    say(f"{file}, {ranks} ranks, {settings}: {total:.0f} ms")
    return {"deepspeed": file, "ranks": ranks, "settings": settings, **found, "total": total}


if __name__ == "__main__":
    typer.run(main)
