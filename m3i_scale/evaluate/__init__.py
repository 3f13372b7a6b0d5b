"""Measure what frozen features are worth: kNN, linear probe, zero-shot, retrieval."""
