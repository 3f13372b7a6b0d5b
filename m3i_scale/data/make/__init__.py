"""Make shards: inputs of any kind, the layout of samples, the one writer."""
