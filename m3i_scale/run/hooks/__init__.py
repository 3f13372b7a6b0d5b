"""What acts in the loop beside the training step; one purpose a file."""
