"""One machine: processes, heartbeats, failure records, resources, rendezvous and the run folder. No DeepSpeed."""
