"""Read the DeepSpeed JSON: its keys, what "auto" becomes, and whether the engine does what it says."""
