"""Distributions P̂, one class per kind. Recipes can use all kinds that are imported here."""

from m3i_scale.objective.distributions.boltzmann import Boltzmann
from m3i_scale.objective.distributions.gaussian import Gaussian
from m3i_scale.objective.distributions.smooth_l1 import SmoothL1

__all__ = ["Boltzmann", "Gaussian", "SmoothL1"]
