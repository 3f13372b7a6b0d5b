"""Hold what an evaluation has read and loaded, for its measures and pictures."""

from __future__ import annotations

from dataclasses import dataclass

from m3i_scale.evaluate.classifier import Classifier
from m3i_scale.evaluate.features import VisionModel
from m3i_scale.evaluate.intervals import Clusters
from m3i_scale.evaluate.measures import Side
from m3i_scale.evaluate.towers import Towers


@dataclass
class Job:
    """Holds both sides, and what encoded them."""

    vision: VisionModel
    train: Side | None
    test: Side
    clusters: Clusters
    towers: Towers | None
    no_towers: str | None
    classifier: Classifier | None
    no_classifier: str | None
    templates: tuple[str, ...]
