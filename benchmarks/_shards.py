"""Make small shards for benchmarks, and say what small model is trained on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

TINY = """\
recipe:
  decoders:
    dense: {kind: transformer, width: 64, heads: 1, depth: 1, position: relative}
    pool: {kind: attention_pool, width: 64}
backbone:
  config: {image_size: 32, patch_size: 8, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
           intermediate_size: 128}
text:
  config: {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128}
  max_tokens: 16
"""
"""Sections of a run file that extends `m3i`: two layers of 64 channels."""
SHAPES, COLORS = ("circle", "square", "bar"), ("red", "green", "blue", "black", "orange")


def make_shards(folder: Path, samples_per_shard: int = 20) -> Path:
    """Colored shapes with captions and categories, as an image folder turned into shards; the training split."""
    images, random_numbers = folder / "images", np.random.default_rng(0)
    for index in range(160):
        shape, color = SHAPES[index % len(SHAPES)], COLORS[index % len(COLORS)]
        picture = Image.fromarray(random_numbers.integers(160, 255, (48, 48, 3), dtype=np.uint8))
        left, top = (int(value) for value in random_numbers.integers(4, 20, 2))
        box = (left, top, left + 22, top + (6 if shape == "bar" else 22))
        pen = ImageDraw.Draw(picture)
        pen.ellipse(box, fill=color) if shape == "circle" else pen.rectangle(box, fill=color)
        path = images / shape / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        path.with_suffix(".txt").write_text(f"a {color} {shape} number {index}")
    command = [sys.executable, "-m", "m3i_scale", "shards", "make", "imagefolder"]
    command += [
        "--input",
        str(images),
        "--output",
        str(folder / "shards"),
        "--samples-per-shard",
        str(samples_per_shard),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "shards" / "train"
