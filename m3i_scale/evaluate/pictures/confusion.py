"""Confusion matrix of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from m3i_scale.evaluate.pictures.draw import INK, drawable
from m3i_scale.host.picture_files import Picture

MOST_CLASSES = 20
"""Maximum number of classes; if there are more, the most confused ones are drawn."""
OTHERS = "others"
_CELL, _MARGIN, _LETTERS, _LETTER_SIZE = 38, 12, 28, 13
_CORNER = "true (samples), predicted:"


def chosen_classes(truth: Sequence[str], predicted: Sequence[str], most: int = MOST_CLASSES) -> list[str]:
    """Return the true classes to draw, sorted by name: all, or the classes of the most frequent confusions."""
    frequent = [name for name, _ in sorted(Counter(truth).items(), key=lambda item: (-item[1], item[0]))]
    wrong = Counter(pair for pair in zip(truth, predicted, strict=True) if pair[0] != pair[1])
    confused = [name for pair, _ in sorted(wrong.items(), key=lambda item: (-item[1], item[0])) for name in pair]
    known = set(frequent)
    return sorted([name for name in dict.fromkeys([*confused, *frequent]) if name in known][:most])


def row_shares(
    truth: Sequence[str], predicted: Sequence[str], classes: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the row-normalized confusion matrix (K, K + 1), the last column for all other classes, and the number of
    samples per class (K). Each of the `classes` must have samples."""
    number = {name: place for place, name in enumerate(classes)}
    counts_KP = np.zeros((len(classes), len(classes) + 1), dtype=np.int64)
    for true, guess in zip(truth, predicted, strict=True):
        if true in number:
            counts_KP[number[true], number.get(guess, len(classes))] += 1
    counts_K = counts_KP.sum(axis=1)
    return counts_KP / counts_K[:, None], counts_K


def confusion(truth: Sequence[str], predicted: Sequence[str], by: str) -> Picture:
    """Return the picture `confusion`: rows are true classes, columns predicted ones, values percent of the row. `by` is
    the name of the classifier."""
    classes = chosen_classes(truth, predicted)
    shares_KP, counts_K = row_shares(truth, predicted, classes)
    has_others = bool(shares_KP[:, -1].any())
    columns = [*classes, *([OTHERS] if has_others else [])]
    right = sum(true == guess for true, guess in zip(truth, predicted, strict=True)) / len(truth)
    total = len(set(truth))
    some = "" if total == len(classes) else f"; the {len(classes)} most confused of {total} classes"
    wrong = [
        (shares_KP[row, column], f"{classes[row]} as {columns[column]} {shares_KP[row, column]:.0%}")
        for row, column in np.ndindex(len(classes), len(columns))
        if row != column and shares_KP[row, column] > 0
    ]
    worst = [text for _, text in sorted(wrong, key=lambda item: -item[0])[:5]]
    return Picture(
        "confusion",
        f"Confusion of classes by {by}: {right:.0%} of {len(truth)} samples are right{some}",
        "True classes by row, predicted ones by column, in percent of the row. Most confused:"
        f" {', '.join(worst) or 'none'}.",
        _matrix(shares_KP[:, : len(columns)], classes, columns, counts_K),
    )


def _matrix(
    shares_KP: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], counts_K: NDArray[np.int64]
) -> Image.Image:
    font = ImageFont.load_default(_LETTER_SIZE)
    above = [drawable(name, _LETTERS) for name in columns]
    beside = [f"{drawable(name, _LETTERS)} ({count})" for name, count in zip(rows, counts_K, strict=True)]
    left, top = (_MARGIN + 6 + round(max(map(font.getlength, names))) for names in ([*beside, _CORNER], above))
    size = (left + len(columns) * _CELL + _MARGIN, top + len(rows) * _CELL + _MARGIN)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, top - 24), _CORNER, fill=INK, font=font)
    for place, name in enumerate(above):
        label = Image.new("RGB", (top - _MARGIN, _CELL), "white")
        ImageDraw.Draw(label).text((4, _CELL // 2), name, fill=INK, font=font, anchor="lm")
        picture.paste(label.rotate(90, expand=True), (left + place * _CELL, _MARGIN))
    for row, name in enumerate(beside):
        y = top + row * _CELL
        draw.text((left - 6, y + _CELL // 2), name, fill=INK, font=font, anchor="rm")
        for column, share in enumerate(shares_KP[row]):
            x = left + column * _CELL
            full = (22, 120, 84) if row == column else (176, 48, 44)
            colour = tuple(round(245 + (part - 245) * share**0.6) for part in full)
            draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), fill=colour)
            if share >= 0.005:
                ink = "white" if share > 0.35 else INK
                draw.text(
                    (x + _CELL // 2 - 1, y + _CELL // 2 - 1), f"{100 * share:.0f}", fill=ink, font=font, anchor="mm"
                )
    return picture
