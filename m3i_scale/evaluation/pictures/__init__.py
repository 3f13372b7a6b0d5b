"""Visualizations of learned features, attention, rankings and predictions."""
