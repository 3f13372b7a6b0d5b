"""M3I pre-training at any size: one formula, one engine, one command."""

__version__ = "0.1.0"
