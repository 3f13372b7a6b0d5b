"""How long saves in the background hold a run of ViT-L/16 up, the first and later ones, and how long a resume takes."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from _gpu_runs import Runs
from _gpu_steps import SMALL
from _rows import Rows
from _shards import make_shards

SAVED_EVERY, STEPS = {"cuda": 150, "cpu": 6}, {"cuda": 450, "cpu": 18}
"""So many that a save is over before the next one begins: that would wait for it."""
IMAGES = {"cuda": 16, "cpu": 8}
DEEPSPEED = {"cuda": "zero1_bf16", "cpu": "zero1_cpu_fp32"}
RUN = """
extends: m3i
name: save
backbone: {preset: vit-l/16}
data: {streams: 4}
checkpoint: {keep_latest: 1}
log: {every_steps: 1, progress: false}
optim: {warmup_steps: 2}
"""


def measure(mode: str, rows: Rows) -> None:
    """Rows: the run ends and goes on; figures: seconds of a step, of one that follows a save, of a resume."""
    every, steps = SAVED_EVERY[mode], STEPS[mode]
    sizes = [f"optim.batch_size={IMAGES[mode]}", f"optim.micro_batch_size={IMAGES[mode]}"]
    overrides = [*(SMALL if mode == "cpu" else ()), *sizes, f"checkpoint.every_steps={every}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = Runs(folder, make_shards(folder), RUN)
        seconds = runs.finish("run", steps, DEEPSPEED[mode], *overrides)
        taken = {step: record["time/step"] for step, record in runs.records("run").items()}
        rows.must("steps of the run", steps, len(taken), ok=len(taken) == steps)
        size = sum(file.stat().st_size for file in (folder / "run" / "checkpoints").rglob("*") if file.is_file())
        rows.figure("checkpoint, GB", size / 1e9)
        rows.figure("the whole run, s", seconds)
        rows.figure("a step, s", statistics.median(taken[step] for step in range(3, every)))
        for number, step in enumerate(range(every, steps, every), 1):
            rows.figure(f"the step after save {number}, s", taken[step + 1])
        seconds = runs.finish("run", steps + 1, DEEPSPEED[mode], *overrides)
        last = max(runs.records("run"))
        rows.must("a step after a resume", steps + 1, last, ok=last == steps + 1)
        rows.figure("start, resume, one step and a save, s", seconds)
