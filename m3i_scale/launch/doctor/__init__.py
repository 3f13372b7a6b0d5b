"""Check whether every machine is ready for a run; nothing is changed."""
