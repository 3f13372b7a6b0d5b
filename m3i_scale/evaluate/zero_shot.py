"""Zero-shot classification: class names become captions, and the nearest caption is the prediction."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from m3i_scale.errors import ConfigError
from m3i_scale.evaluate.features import unit_rows

TEMPLATES = ("{}", "a picture of {}", "an image showing {}")
"""Default prompts; the embeddings of a class's prompts are averaged."""

TextEncoder = Callable[[list[str]], NDArray[np.float32]]
"""Captions → unit vectors (B, E)."""


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
