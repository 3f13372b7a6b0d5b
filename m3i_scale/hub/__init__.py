"""Export in the Hugging Face Hub format, proven in a fresh process."""
