"""WebDataset streams: making shards, a fixed order of samples, decoding, views, tokens."""
