"""`m3i-scale checkpoint`: look at checkpoints, compare them, remove those that no rule keeps."""
