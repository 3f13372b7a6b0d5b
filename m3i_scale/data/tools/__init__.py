"""These tools read shards that others made: every tar may be hostile, every fault is reported, none stops the rest."""
