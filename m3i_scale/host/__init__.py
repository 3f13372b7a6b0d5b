"""One machine: processes, heartbeats, failure records, resources, the process group and the run folder."""
