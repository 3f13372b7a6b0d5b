"""Image-text retrieval metrics, with equal captions treated as one item."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

DEPTHS = (1, 5, 10)
_CHUNK = 1_024
ScalarT = TypeVar("ScalarT", bound=np.generic)


@dataclass(frozen=True)
class Retrieval:
    """Ranks (0 is best) of the first correct item, with chance levels."""

    image_to_text: NDArray[np.int64]
    """For every image, rank of its caption among the distinct captions."""
    text_to_image: NDArray[np.int64]
    """For every distinct caption, best rank of its images among all images."""
    caption_of: NDArray[np.int64]
    """Index of every image's caption."""

    def chance(self, direction: str, depth: int) -> float:
        """Return the expected recall at `depth` for a random ranking."""
        images, distinct = len(self.caption_of), len(self.text_to_image)
        if direction == "image_to_text":
            return min(depth / distinct, 1.0)
        depth = min(depth, images)
        misses = [comb(images - int(count), depth) / comb(images, depth) for count in np.bincount(self.caption_of)]
        return float(1 - np.mean(misses))


def distinct_captions(captions: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct captions, and the index of each sample's caption."""
    distinct, number = np.unique(np.asarray(captions, dtype=object), return_inverse=True)
    return list(distinct), number.astype(np.int64)


def rank(images_NE: NDArray[np.float32], texts_UE: NDArray[np.float32], caption_of_N: NDArray[np.int64]) -> Retrieval:
    """Return ranks in both directions. Ties count against the model, so collapsed features get the worst rank.
    `texts_UE` has the embeddings of the distinct captions."""
    captions_U = np.arange(len(texts_UE))
    image_to_text = [
        _ranks(block @ texts_UE.T, own[:, None] == captions_U)
        for block, own in zip(_chunks(images_NE), _chunks(caption_of_N), strict=True)
    ]
    text_to_image = [
        _ranks(block @ images_NE.T, own[:, None] == caption_of_N)
        for block, own in zip(_chunks(texts_UE), _chunks(captions_U), strict=True)
    ]
    return Retrieval(np.concatenate(image_to_text), np.concatenate(text_to_image), caption_of_N)


def _ranks(scores_QC: NDArray[np.float32], right_QC: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the number of wrong candidates that score at least as high as the best correct one."""
    best_Q1 = np.where(right_QC, scores_QC, -np.inf).max(axis=1, keepdims=True)
    # equal embeddings may differ in the last bits of a matrix product; such a difference is a tie
    return np.asarray(((scores_QC >= best_Q1 - 1e-6) & ~right_QC).sum(axis=1), dtype=np.int64)


def _chunks(rows: NDArray[ScalarT]) -> list[NDArray[ScalarT]]:
    return [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
