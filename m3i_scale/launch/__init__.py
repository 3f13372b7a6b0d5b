"""Start a run: one description of hosts and ranks, one file per launcher."""
