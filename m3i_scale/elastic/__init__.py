"""Elastic launcher over ssh or srun: one agent per host, restarts with the hosts that are left."""
