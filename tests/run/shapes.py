"""Shards of colored shapes, run files over them, and runs of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch import Job, start_deepspeed, start_ranks
from PIL import Image, ImageDraw
from tiny import in_parts, tiny_overrides

from m3i_scale.config import load_run
from m3i_scale.run.setup import run_yaml
from m3i_scale.shards.image_folders import imagefolder_input
from m3i_scale.shards.make import make_shards
from m3i_scale.shards.options import ShardOptions

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "white": (240, 240, 240)}
SHAPES = ("disc", "square", "bar")


def draw(shape: str, color: str, number: int) -> Image.Image:
    image = Image.new("RGB", (44, 40), (number * 9 % 90, 60, 90 - number * 7 % 80))
    left, top = 4 + number % 5, 3 + number % 7
    paint = ImageDraw.Draw(image)
    box = (left, top, left + 24, top + (8 if shape == "bar" else 24))
    (paint.ellipse if shape == "disc" else paint.rectangle)(box, fill=COLORS[color])
    return image


def make_shapes(root: Path) -> Path:
    """`train` (8 shards or more) and `val`, with captions, classes and a tokenizer."""
    for shape in SHAPES:
        folder = root / "images" / shape
        folder.mkdir(parents=True)
        for number in range(32):
            color = list(COLORS)[number % 4]
            draw(shape, color, number).save(folder / f"{number:02d}.png")
            (folder / f"{number:02d}.txt").write_text(f"a {color} {shape} number {number}")
    options = ShardOptions(samples_per_shard=6, multiple_of=8, vocabulary=80)
    shares = {"train": 0.75, "val": 0.25}
    make_shards(imagefolder_input(root / "images"), root / "shards", name="shapes", options=options, shares=shares)
    return root / "shards"


def run_overrides(recipe: str, shards: Path, output_dir: Path) -> list[str]:
    return [
        *tiny_overrides(recipe),
        f"output_dir={output_dir}",
        f"data.datasets.shapes.path={shards / 'train'}",
        "data.streams=4",
        "optim.batch_size=8",
        "optim.micro_batch_size=4",
        "optim.steps=8",
        "optim.warmup_steps=2",
        "checkpoint.every_steps=2",
        "checkpoint.keep_latest=3",
        "log.every_steps=1",
        "log.progress=false",
    ]


def write_run(folder: Path, shards: Path, recipe: str = "m3i", *overrides: str) -> Path:
    """A complete run file in `folder`; the run writes to `out` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "in_parts.json").write_text(json.dumps(in_parts("zero3_cpu")))
    path = folder / "run.yaml"
    given = [*run_overrides(recipe, shards, folder / "out"), f"deepspeed={folder / 'in_parts.json'}", *overrides]
    path.write_text(run_yaml(load_run(recipe, given)))
    return path


def train(run_file: Path, *overrides: str, world: int = 1, launcher: bool = False, logs: str = "logs") -> Job:
    arguments = ["train", str(run_file), *overrides]
    if launcher:
        return start_deepspeed(["--module", "m3i_scale", *arguments], world, run_file.parent / logs)
    return start_ranks(["-m", "m3i_scale", *arguments], world, run_file.parent / logs)


def metrics(run_file: Path) -> dict[int, dict[str, Any]]:
    """Figures by step, without those that measure time and memory; the last one of a repeated step."""
    lines = [json.loads(line) for line in (run_file.parent / "out" / "metrics.jsonl").read_text().splitlines()]
    timed = ("_s", "memory", "time", "per_s", "time/", "mfu")
    return {
        line["step"]: {key: value for key, value in line.items() if not any(part in key for part in timed)}
        for line in lines
        if line["kind"] == "train"
    }
