"""Checkpoints commit: they are written under a temporary name, checked, renamed."""
