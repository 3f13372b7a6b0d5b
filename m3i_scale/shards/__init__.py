"""Creation, validation and resharding of WebDataset shards."""
