"""Environment check: whether every node is ready for a run. Nothing is changed."""
