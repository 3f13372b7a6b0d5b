"""Remote shards: addresses, prefetching and the cache on local disk."""
