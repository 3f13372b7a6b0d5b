"""Distributions P̂, one class per kind. Recipes can use all kinds that are imported here."""

from m3i_scale.objective.distributions.base import Gaussian, SmoothL1
from m3i_scale.objective.distributions.boltzmann import Boltzmann

__all__ = ["Boltzmann", "Gaussian", "SmoothL1"]
