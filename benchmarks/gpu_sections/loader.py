"""Measure what the loader gives on this host, and how long ViT-B/16 waits for it, on JPEGs of ImageNet's size."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from _gpu_runs import Runs
from _gpu_steps import SMALL
from _rows import Rows
from PIL import Image

PICTURES, SIZE, QUALITY = {"cuda": 512, "cpu": 64}, (500, 375), 90
SAMPLES, CROP = {"cuda": 4096, "cpu": 128}, {"cuda": 224, "cpu": 64}
BATCH, STEPS = {"cuda": 256, "cpu": 8}, {"cuda": 24, "cpu": 6}
DEEPSPEED = {"cuda": "zero1_bf16", "cpu": "zero1_cpu_fp32"}
RUN = """
extends: clip
name: loader
log: {every_steps: 1, progress: false}
optim: {warmup_steps: 2}
"""
LOADERS = Path(__file__).resolve().parent.parent / "loaders.py"


def measure(mode: str, rows: Rows) -> None:
    """Rows: every step was logged; figures: images a second by workers, and the wait for data of a training step."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = _make_shards(folder, PICTURES[mode])
        counts = sorted({1, max(cores // 2, 1), max(cores - 1, 1)})
        rows.figure("loader alone, images/s by workers", _rates(folder, shards, mode, counts))
        runs = Runs(folder, shards, RUN)
        sizes = [f"optim.batch_size={BATCH[mode]}", f"optim.micro_batch_size={BATCH[mode]}"]
        sizes += [f"data.num_workers={counts[-1]}", *(SMALL if mode == "cpu" else ("backbone.preset=vit-b/16",))]
        runs.finish("run", STEPS[mode], DEEPSPEED[mode], *sizes)
        records = runs.records("run")
        rows.must("steps of the run", STEPS[mode], len(records), ok=len(records) == STEPS[mode])
        later = [record for step, record in records.items() if step > 3]
        for figure in ("throughput/samples_per_s", "time/data_wait_share", "time/data", "perf/mfu"):
            rows.figure(f"training, {figure}", statistics.median(record[figure] for record in later))


def _make_shards(folder: Path, count: int) -> Path:
    """Draw gradients under noise, which compress about as photographs do."""
    draw = np.random.default_rng(0)
    across = np.linspace(0, 255, SIZE[0])[None, :, None]
    for number in range(count):
        noise = draw.normal(0, 12, (SIZE[1], SIZE[0], 1))
        pixels = np.clip(across * draw.uniform(0.2, 1, 3) + noise, 0, 255).astype(np.uint8)
        path = folder / "pictures" / f"class_{number % 2}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=QUALITY)
        path.with_suffix(".txt").write_text(f"picture number {number}")
    command = [sys.executable, "-m", "m3i_scale", "shards", "make", "imagefolder", "--samples-per-shard", "32"]
    command += ["--input", str(folder / "pictures"), "--output", str(folder / "shards")]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "shards" / "train"


def _rates(folder: Path, shards: Path, mode: str, counts: list[int]) -> dict[str, float]:
    """Return those of this project's stream alone, as `loaders.py` measures it."""
    command = [sys.executable, str(LOADERS), "--json", "--data", str(shards), "--folder", str(folder / "layouts")]
    command += ["--images", "jpeg", "--samples", str(SAMPLES[mode]), "--draw", str(SAMPLES[mode] // 2)]
    command += ["--crop", str(CROP[mode]), "--batch", str(BATCH[mode]), "--repeats", "1", "--only", "m3i_scale"]
    command += ["--no-resume", "--memory-s", "0", *(part for count in counts for part in ("--workers", str(count)))]
    document = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {count: rates["m3i_scale"] for count, rates in document["workers"].items()}
