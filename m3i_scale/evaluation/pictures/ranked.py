"""Pictures of retrieval results: images for an image, images for a text, texts for an image, correct ones marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3i_scale.evaluation.pictures.draw import RIGHT, Cell, grid
from m3i_scale.run.callbacks import Picture

SHOWN = 6
"""Number of candidates to draw."""


@dataclass(frozen=True)
class Candidate:
    """One candidate of a query."""

    number: int
    score: float
    rank: int
    """0 is best."""
    right: bool | None
    """None if unknown."""


def best_of(
    scores_QC: NDArray[np.floating], right_of: Sequence[NDArray[np.bool_] | None], count: int = SHOWN
) -> list[list[Candidate]]:
    """Return the best candidates of every query, best first. If none of them is correct, append the best correct one.
    Non-candidates, such as the query itself, have score −inf. `right_of` is None for queries whose correct candidates
    are unknown."""
    candidates = []
    for scores_C, right_C in zip(scores_QC, right_of, strict=True):
        order = np.argsort(-scores_C, kind="stable")
        order = order[np.isfinite(scores_C[order])]
        shown = list(range(min(count, len(order))))
        if right_C is not None and not right_C[order[: len(shown)]].any():
            shown += np.flatnonzero(right_C[order])[:1].tolist()
        candidates.append(
            [
                Candidate(number, float(scores_C[number]), rank, None if right_C is None else bool(right_C[number]))
                for rank, number in ((rank, int(order[rank])) for rank in shown)
            ]
        )
    return candidates


@dataclass(frozen=True)
class RankedPicture:
    """Kind of retrieval picture."""

    name: str
    title: str
    query: str
    """Heading of the query column."""


NEIGHBOURS = RankedPicture("neighbours", "Nearest neighbours (cosine of the image vectors)", "image")
TEXT_TO_IMAGE = RankedPicture("text_to_image", "Text to image: the nearest images of a caption", "caption")
IMAGE_TO_TEXT = RankedPicture("image_to_text", "Image to text: the nearest captions of an image", "image")


def ranked(
    kind: RankedPicture,
    queries: Sequence[Cell],
    names: Sequence[str],
    candidates_by_query: Sequence[Sequence[Candidate]],
    cell_of: Callable[[int], Cell],
) -> Picture:
    """Return a picture of queries and their candidates, best first, with correct ones in a green frame. The alternative
    text contains the `names` of the queries."""
    rows = []
    for query, candidates in zip(queries, candidates_by_query, strict=True):
        row = [query]
        for one in candidates:
            cell = cell_of(one.number)
            row.append(
                Cell(cell.image, f"{one.rank + 1} · {one.score:.2f} {cell.caption}", RIGHT if one.right else None)
            )
        rows.append(row)
    known = any(one.right is not None for candidates in candidates_by_query for one in candidates)
    marked = "; right ones are framed" if known else ""
    ranks = [f"{name}: {_ranks_of(candidates)}" for name, candidates in zip(names, candidates_by_query, strict=True)]
    return Picture(
        kind.name, kind.title + marked, f"{kind.title}. {'; '.join(ranks)}.", grid(rows, (kind.query, "nearest"))
    )


def _ranks_of(candidates: Sequence[Candidate]) -> str:
    right = [str(one.rank + 1) for one in candidates if one.right]
    return f"right at rank {', '.join(right)}" if right else "nothing known to be right"
