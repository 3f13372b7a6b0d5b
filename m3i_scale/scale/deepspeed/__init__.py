"""The DeepSpeed JSON: its keys, what "auto" becomes, and whether the engine obeys it."""
