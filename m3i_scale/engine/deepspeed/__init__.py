"""Read the DeepSpeed JSON: validate its keys, resolve "auto", and check that the engine follows it."""
