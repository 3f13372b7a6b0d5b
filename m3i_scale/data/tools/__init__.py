"""Tools for shards that others made: every tar is hostile, every fault is told, none stops the rest."""
