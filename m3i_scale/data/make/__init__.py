"""Shards are made here: inputs of any kind, the layout of samples, and the writer that all of them share."""
