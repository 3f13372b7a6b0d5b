"""Make a few shards of colored shapes with captions and classes, for the own loop and the notebook.

Usage: python examples/coloured_shapes.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (240, 210, 60)}
SHAPES = ("disc", "square", "bar")
OF_EACH = 16
"""Images of a shape in a color."""


def draw(shape: str, color: str, number: int) -> Image.Image:
    """Return an image of 48 × 48 pixels; the number moves the shape, and tints what lies behind it."""
    image = Image.new("RGB", (48, 48), (number * 9 % 90, 60, 90 - number * 7 % 80))
    left, top = 4 + number * 3 % 14, 4 + number * 5 % 14
    box = (left, top, left + 26, top + (9 if shape == "bar" else 26))
    paint = ImageDraw.Draw(image)
    (paint.ellipse if shape == "disc" else paint.rectangle)(box, fill=COLORS[color])
    return image


def make_shards(folder: Path) -> Path:
    """Write images into FOLDER/images and shards of them into FOLDER/shards; return the folder of `train`, beside which
    `val` lies."""
    for shape in SHAPES:
        (folder / "images" / shape).mkdir(parents=True)
        for color in COLORS:
            for number in range(OF_EACH):
                path = folder / "images" / shape / f"{color}-{number}.png"
                draw(shape, color, number).save(path)
                path.with_suffix(".txt").write_text(f"a {color} {shape}", encoding="utf-8")
    command = [sys.executable, "-m", "m3i_scale", "shards", "make", "imagefolder", "--json"]
    places = ["--input", str(folder / "images"), "--output", str(folder / "shards")]
    subprocess.run([*command, *places, "--split", "train=0.8,val=0.2"], check=True, stdout=subprocess.DEVNULL)
    return folder / "shards" / "train"


if __name__ == "__main__":
    print(make_shards(Path(sys.argv[1])))
