"""Draw what a model has learnt, from arrays: features, attention, ranks, predictions."""
