"""Targets, the loss terms k of equation (5): one class per kind. Targets of fine-tuning are in `tasks`."""

from m3i_scale.objective.targets.caption import Caption
from m3i_scale.objective.targets.category import Category
from m3i_scale.objective.targets.dense import Dense, DenseNegatives, Pixels
from m3i_scale.objective.targets.patches import Anchor, Gram
from m3i_scale.objective.targets.pooled import Pooled, Spread
from m3i_scale.objective.targets.prototypes import Clusters, DensePrototypes, Prototypes
from m3i_scale.objective.targets.text import Text

__all__ = [
    "Anchor",
    "Caption",
    "Category",
    "Clusters",
    "Dense",
    "DenseNegatives",
    "DensePrototypes",
    "Gram",
    "Pixels",
    "Pooled",
    "Prototypes",
    "Spread",
    "Text",
]
