"""Shards at addresses are read here: how they are named, fetched ahead and kept on the host."""
