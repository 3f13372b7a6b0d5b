"""Backbones (f_θ): thin adapters round `transformers` vision models."""
