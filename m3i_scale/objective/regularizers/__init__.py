"""Regularisers keep the representation of a target from collapsing: the entropy term of equation (2)."""
