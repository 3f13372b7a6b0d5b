"""A second set for `one_stage.py`: scikit-learn's scanned digits, colored, with captions, labels and masks.

1,797 digits of 8 × 8 pixels in 16 levels (Alpaydin and Kaynak), each once, in one of six colors; the last 297 are for
measuring. The caption names color and digit, the label is the digit, the mask is where the ink is.

    python benchmarks/one_stage/digits.py /data/digits
    m3i-scale shards make manifest --input /data/digits/manifest.csv --output /data/digit-shards --mask-column mask
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import typer
from PIL import Image
from sklearn.datasets import load_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    **{"red": (220, 60, 50), "green": (60, 190, 80), "blue": (60, 100, 230)},
    **{"yellow": (240, 210, 60), "violet": (160, 80, 210), "white": (240, 240, 240)},
}
TRAIN, SIDE, LEVELS = 1500, 64, 16


def main(folder: Path) -> None:
    """Write images, masks and manifest.csv into a new folder."""
    folder.mkdir(parents=True)
    digits = load_digits()
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "caption", "label", "mask", "split"])
        for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            color = list(COLORS)[number % len(COLORS)]
            ink = np.asarray(
                Image.fromarray(np.uint8(scan * 255 / LEVELS)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            )
            picture = ink[..., None] / 255 * np.array(COLORS[color])
            Image.fromarray(np.uint8(picture)).save(folder / f"{number:04d}.png")
            Image.fromarray(np.uint8(np.where(ink > 127, 1 + label, 0))).save(folder / f"{number:04d}.mask.png")
            split = "train" if number < TRAIN else "val"
            row = [f"{number:04d}.png", f"a {color} {WORDS[label]}", WORDS[label], f"{number:04d}.mask.png", split]
            table.writerow(row)


if __name__ == "__main__":
    typer.run(main)
