"""DeepSpeed: engine, configuration, partitioned parameters, checkpoints. Serves any `nn.Module`."""
