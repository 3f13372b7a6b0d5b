"""Commands `m3i-scale checkpoint`: inspect, verify, compare and prune checkpoints."""
