"""Callbacks on rank 0 that observe the run: progress, metrics.jsonl, TensorBoard, Weights & Biases. No collectives."""
