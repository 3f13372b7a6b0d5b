"""Whether every machine is ready for a run: looked at, measured, told; nothing is changed."""
