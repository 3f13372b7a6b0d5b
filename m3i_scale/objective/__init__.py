"""The paper, equation by equation. Single-process PyTorch: nothing here knows of DeepSpeed or of a cluster."""
