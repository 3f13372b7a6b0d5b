"""Creation of shards: readers for all kinds of inputs, the layout of samples, and a common writer."""
