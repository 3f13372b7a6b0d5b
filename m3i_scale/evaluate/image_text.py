"""Zero-shot classification and retrieval by the embeddings of images and texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from m3i_scale.errors import ConfigError
from m3i_scale.evaluate.features import unit_rows

TEMPLATES = ("{}", "a picture of {}", "an image showing {}")
"""Default prompts; the embeddings of a class's prompts are averaged."""

TextEncoder = Callable[[list[str]], NDArray[np.float32]]
"""Captions → unit vectors (B, E)."""
DEPTHS = (1, 5, 10)
_CHUNK = 1_024
ScalarT = TypeVar("ScalarT", bound=np.generic)


def prompts_of(name: str, templates: tuple[str, ...]) -> list[str]:
    """Return prompts for a class, with its name in plain words."""
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(f"'{template}' is no prompt template", fix="write the place of the class name as {}")
    plain = " ".join(name.replace("_", " ").replace("-", " ").split())
    return [template.replace("{}", plain) for template in templates]


def class_embeddings(
    classes: list[str], encode: TextEncoder, templates: tuple[str, ...] = TEMPLATES
) -> NDArray[np.float32]:
    """Return one unit vector per class (K, E): the normalized mean of its prompts' embeddings."""
    return unit_rows(np.stack([encode(prompts_of(name, templates)).mean(axis=0) for name in classes]))


def zero_shot_predict(images_NE: NDArray[np.float32], classes_KE: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the class with the highest cosine similarity: (N)."""
    return np.asarray((unit_rows(images_NE) @ classes_KE.T).argmax(axis=1), dtype=np.int64)


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
