"""Checkpoints that commit: written under a temporary name, checked, renamed."""
