"""Atomic checkpoints: they are written under a temporary name, verified, then renamed."""
