"""Distributions P̂, one class per kind. Recipes can use all kinds that are imported here."""

from m3i_scale.objective.distributions.boltzmann import Boltzmann
from m3i_scale.objective.distributions.densities import Gaussian, SmoothL1

__all__ = ["Boltzmann", "Gaussian", "SmoothL1"]
