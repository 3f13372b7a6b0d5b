"""Targets, the loss terms k of equation (5): one class per kind. Targets of fine-tuning are in `tasks`."""

from m3i_scale.objective.targets import caption, category, dense, patches, pooled, prototypes, text

__all__ = ["caption", "category", "dense", "patches", "pooled", "prototypes", "text"]
