"""Targets are the groups k of equation (5), one class a kind. Recipes find those that are imported here."""

from m3i_scale.objective.targets.category import Category
from m3i_scale.objective.targets.dense import Dense, DenseNegatives, Pixels
from m3i_scale.objective.targets.detection import Detection
from m3i_scale.objective.targets.pooled import Pooled, Prototypes
from m3i_scale.objective.targets.segmentation import Segmentation
from m3i_scale.objective.targets.text import Text

__all__ = ["Category", "Dense", "DenseNegatives", "Detection", "Pixels", "Pooled", "Prototypes", "Segmentation", "Text"]
