"""`m3i-scale checkpoint` looks at checkpoints, compares them, and removes those that no rule keeps."""
