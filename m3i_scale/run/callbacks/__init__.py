"""What happens beside the training step; one purpose a file."""
