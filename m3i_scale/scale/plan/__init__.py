"""Memory, communication and time of a run, before anything runs. Knows counts, no recipe."""
