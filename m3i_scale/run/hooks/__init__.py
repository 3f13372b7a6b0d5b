"""Hooks act in the loop beside the training step, on every rank at the same moments; one purpose a file."""
