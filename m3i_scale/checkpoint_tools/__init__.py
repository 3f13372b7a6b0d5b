"""Commands for saved checkpoints: list, verify, inspect, prune and consolidate."""
