"""Backbones (f_θ): thin adapters for `transformers` vision models."""
