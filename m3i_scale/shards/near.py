"""Groups of near-duplicate images, and train/test contamination of evaluation images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from typing_extensions import Self

from m3i_scale.shards.nearest import Alike, Groups, Pairs


class Images(Protocol):
    """Image hashes or features of one dataset."""

    left_out: Counter[str]
    """Images that cannot be compared, by reason."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def place(self, number: int) -> dict[str, str]:
        """Return shard and key of an image."""
        ...

    def likeness(self, number: int, others: Self, other: int) -> dict[str, Any]:
        """Return the similarity to an image of another set."""
        ...

    def pairs(self, threshold: Any, groups: Groups) -> Pairs:
        """Yield enough pairs of similar images to connect all similar ones; the caller joins each pair in `groups`."""
        ...

    def alike(self, others: Self, threshold: Any) -> Alike:
        """Yield the matches in another set for every image that has any."""
        ...


def groups_within(images: Images, threshold: Any) -> list[dict[str, Any]]:
    """Return groups of images connected by similar pairs, the largest first.

    Returns:
        For each group its `size` and its `images`: place, and likeness to the first image.
    """
    connected = Groups(len(images))
    for left, right in images.pairs(threshold, connected):
        connected.join(left, right)
    members: dict[int, list[int]] = {}
    for number, first in enumerate(connected.of(np.arange(len(images))).tolist()):
        if first != number:
            members.setdefault(first, []).append(number)
    groups = [
        [images.place(first), *({**images.place(other), **images.likeness(first, images, other)} for other in others)]
        for first, others in sorted(members.items(), key=lambda group: (-len(group[1]), group[0]))
    ]
    return [{"size": len(group), "images": group} for group in groups]


def leaks(evaluation: Images, training: Images, threshold: Any) -> list[dict[str, Any]]:
    """Return evaluation images that resemble training images, those with the most matches first.

    Returns:
        For each image its place; `alike`: number of matches; `training`: place and likeness of the nearest matches.
    """
    found = sorted(evaluation.alike(training, threshold), key=lambda leak: (-leak[1], leak[0]))
    return [
        {
            **evaluation.place(number),
            "alike": count,
            "training": [
                {**training.place(other), **evaluation.likeness(number, training, other)} for other in nearest
            ],
        }
        for number, count, nearest in found
    ]


def report_of(
    training: Images, evaluation: Images | None, measure: str, threshold: float, sources: Sequence[str]
) -> dict[str, Any]:
    """Return near-duplicates within a dataset, or its overlap with an evaluation set, as JSON types.

    Args:
        training: the dataset.
        evaluation: evaluation set; None finds near-duplicates within `training`.
        measure: quantity of `threshold`: "distance" or "similarity".
        threshold: maximum distance or minimum similarity.
        sources: paths of the dataset.
    """
    report: dict[str, Any] = {
        "source": list(sources),
        "threshold": {measure: threshold},
        "images": len(training),
        "not_compared": dict(training.left_out.most_common()),
    }
    if evaluation is None:
        groups = groups_within(training, threshold)
        beyond = sum(group["size"] - 1 for group in groups)
        return report | {"groups": len(groups), "beyond_first": beyond, "near_duplicates": groups}
    found = leaks(evaluation, training, threshold)
    return report | {
        "evaluation_images": len(evaluation),
        "evaluation_not_compared": dict(evaluation.left_out.most_common()),
        "leaked": len(found),
        "leaked_share": round(len(found) / len(evaluation), 6) if len(evaluation) else 0.0,
        "leaks": found,
    }
