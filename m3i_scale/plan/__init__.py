"""Compute memory, communication and time of a run without running it. This package is independent of recipes."""
