"""Where a run is started: one description of hosts and ranks, one file per launcher."""
