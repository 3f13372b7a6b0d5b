"""Evaluation of frozen features: kNN, linear probe, zero-shot, retrieval."""
