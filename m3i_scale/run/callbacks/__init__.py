"""Callbacks look on, on rank 0 alone: progress, metrics.jsonl, TensorBoard, Weights & Biases. No collectives."""
