"""Visualizations of learned features, attention and predictions."""
