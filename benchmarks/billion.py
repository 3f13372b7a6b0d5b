"""A billion parameters on a small machine: the whole all-in-one recipe on two ranks, five steps, resumed, exported.

ViT-g/14 (or InternImage-H), EMA teacher, BERT-Base text tower and categories included, under ZeRO-3 with bf16
states and recomputed activations, from real shards of as many samples as one step takes, so that every step sees the
same batch. Measured is the largest memory that each rank's process ever held, from start-up to the last checkpoint.

    python benchmarks/billion.py --json [--backbone internimage-h]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import typer
import yaml
from _common import emit, machine, say
from deepspeed.accelerator import get_accelerator
from PIL import Image, ImageDraw
from torch.distributed.elastic.utils.distributed import get_free_port

from m3i_scale.backbones import describe_presets
from m3i_scale.backbones.families import PRESETS
from m3i_scale.errors import EXIT_USER_ERROR, did_you_mean

RANKS, MICRO_BATCH, STEPS, RESUMED_STEPS = 2, 2, 5, 6
LR = 1e-5
"""From the first step on, for four samples: with 5e-5 the category's logits jump back and forth, the rest falls."""
COLORS = ("red", "green", "blue", "black")
BLACK, GRAY = (0, 0, 0), (200, 200, 200)
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    **{"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"},
}
"""glibc gives freed tensors back to the kernel: slower, and what counts here is memory
(docs/benchmarks/performance.md)."""
STILL = {
    **{"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "flip": 0.0},
    **{"color_jitter_p": 0.0, "grayscale": 0.0, "blur": [0.0], "solarize": [0.0]},
}
"""No augmentation: the same pictures at every step."""


def main(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document (always does)."),
    backbone: str = typer.Option("vit-g/14", help="A preset of `m3i-scale backbones`."),
    deepspeed: str = typer.Option("zero3_cpu_lean", help="On GPUs: zero3_bf16_lean."),
    output: Path = typer.Option(None, help="Keep shards, checkpoints and export here."),
) -> None:
    """Print {parameters, peak_gib_total, predicted_gib_total, losses, seconds_per_step, resumed, export, …}.

    The prediction is the peak of steps; what is measured covers the start, checkpoints and a resume too.
    """
    if backbone not in PRESETS:
        say(f"error: no backbone '{backbone}': {did_you_mean(backbone, PRESETS)}")
        sys.exit(EXIT_USER_ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = output or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        emit(_demonstrate(folder, backbone, deepspeed))


def _demonstrate(folder: Path, backbone: str, deepspeed: str) -> dict[str, Any]:
    shards = _make_shards(folder)
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(run_values(folder, shards, backbone, deepspeed), sort_keys=False))
    say("planning …")
    predicted = _planned(run_file)
    say("training …")
    first = _train(folder, run_file, STEPS)
    say("resuming …")
    second = _train(folder, run_file, RESUMED_STEPS)
    say("exporting …")
    started = time.perf_counter()
    command = [sys.executable, "-m", "m3i_scale", "export", str(folder / "run"), "--output", str(folder / "export")]
    export = _watched([*command, "--overwrite", "--json"], folder / "export.log")
    records = _records(folder)
    losses = {int(record["step"]): record["loss"] for record in records}
    exported = json.loads((folder / "export.log.out").read_text())
    return {
        "backbone": backbone,
        "parameters": describe_presets([backbone])[0]["parameters"],
        "peak_gib_total": max(first["peak_gib"], second["peak_gib"]),
        "predicted_gib_total": RANKS * predicted["peak_gib_per_rank"],
        "predicted_parts_gib": predicted["parts"],
        "peak_gib_first": first["peak_gib_by_rank"],
        "peak_gib_resumed": second["peak_gib_by_rank"],
        "losses": [losses[step] for step in range(1, STEPS + 1)],
        "falling": losses[STEPS] < losses[1],
        "resumed": {
            "from_step": STEPS,
            "loss": losses[RESUMED_STEPS],
            "below_the_first": losses[RESUMED_STEPS] < losses[1],
        },
        "seconds_per_step": min(record["time/step"] for record in records[1:STEPS]),
        "export": exported | {"seconds": time.perf_counter() - started, "peak_gib": export["peak_gib"]},
        "settings": {"ranks": RANKS, "micro_batch": MICRO_BATCH, "deepspeed": deepspeed},
        "machine": machine(),
    }


def run_values(folder: Path, shards: Path, backbone: str, deepspeed: str) -> dict[str, Any]:
    """The run file: everything at full size but the batch."""
    maps = backbone.startswith("internimage")
    return {
        "extends": "m3i",
        "name": "billion",
        "output_dir": str(folder / "run"),
        "backbone": {
            "preset": backbone,
            "activation_checkpointing": "full",
            **({"attention": "across_images"} if maps else {"config": {"initializer_range": 0.015}}),
        },
        "data": {
            "datasets": {"shapes": {"path": str(shards)}},
            "streams": 2,
            "augment": STILL,
        },
        "optim": {
            "batch_size": RANKS * MICRO_BATCH,
            "micro_batch_size": MICRO_BATCH,
            "steps": RESUMED_STEPS,
            **{"lr": LR, "min_lr": LR, "warmup_steps": 0, "betas": [0.9, 0.98], "clip_grad_norm": 3.0},
        },
        "deepspeed": deepspeed,
        # A save in the background would hold a second copy of the states, for which there is no room here.
        "checkpoint": {"every_steps": 100, "keep_latest": 1, "background": False},
        "log": {"every_steps": 1, "progress": False},
    }


def _planned(run_file: Path) -> dict[str, Any]:
    """What `m3i-scale plan` says of the run before it starts: the peak of its steps, not of a checkpoint."""
    device = "cpu" if get_accelerator().device_name() == "cpu" else "h100"
    command = [sys.executable, "-m", "m3i_scale", "plan", str(run_file), "--ranks-per-node", str(RANKS)]
    command += ["--hardware", device, "--memory-gib", "1024", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=ENVIRONMENT | os.environ, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _train(folder: Path, run_file: Path, steps: int) -> dict[str, Any]:
    command = [str(Path(sys.executable).parent / "deepspeed"), "--no_local_rank", "--num_accelerators", str(RANKS)]
    command += ["--master_port", str(get_free_port()), "--module", "m3i_scale", "train", str(run_file)]
    return _watched([*command, f"optim.steps={steps}"], folder / f"train-{steps}.log")


def _watched(command: list[str], log: Path) -> dict[str, Any]:
    """Run a command; the largest resident memory that each of its processes with m3i_scale ever had.

    The kernel keeps the maximum (VmHWM), so that no peak between two looks is missed.
    """
    peaks: dict[int, float] = {}
    with log.open("wb") as errors, log.with_suffix(".log.out").open("wb") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=errors, env=ENVIRONMENT | os.environ)
        while process.poll() is None:
            for pid in _processes(process.pid):
                peaks[pid] = max(peaks.get(pid, 0.0), _peak_gib(pid))
            time.sleep(0.2)
    if process.returncode:
        say(log.read_text(errors="replace")[-4000:])
        raise RuntimeError(f"{' '.join(command[:6])} … ended with exit code {process.returncode}")
    ranks = sorted(peaks.values())[-RANKS:]
    return {"peak_gib": sum(ranks), "peak_gib_by_rank": ranks}


def _processes(root: int) -> list[int]:
    try:
        parent = psutil.Process(root)
        return [root, *(child.pid for child in parent.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _peak_gib(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return 0.0
    peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(peak[0]) / 2**20 if peak else 0.0


def _records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def _make_shards(folder: Path) -> Path:
    images = folder / "images"
    for index in range(RANKS * MICRO_BATCH):
        kind = ("circle", "square")[index % 2]
        picture = Image.new("RGB", (256, 256), GRAY)
        pen, box = ImageDraw.Draw(picture), (40 + 20 * index, 40, 140 + 20 * index, 140)
        (pen.ellipse if kind == "circle" else pen.rectangle)(box, fill=COLORS[index], outline=BLACK)
        path = images / kind / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        path.with_suffix(".txt").write_text(f"a {COLORS[index]} {kind}")
    command = [sys.executable, "-m", "m3i_scale", "shards", "make", "imagefolder", "--input", str(images)]
    command += ["--output", str(folder / "shards"), "--samples-per-shard", str(MICRO_BATCH)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "shards" / "train"


if __name__ == "__main__":
    typer.run(main)
