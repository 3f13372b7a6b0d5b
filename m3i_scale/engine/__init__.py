"""DeepSpeed: engine, configuration, partitioned parameters, collectives. Serves any `nn.Module`."""
