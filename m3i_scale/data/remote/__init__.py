"""Shards at addresses: how they are named, read, fetched ahead and kept on the host."""
