"""Compute memory, communication and time of a run before anything runs. Nothing here knows a recipe."""
