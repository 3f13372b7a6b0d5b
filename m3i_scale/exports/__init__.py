"""Export to the Hugging Face Hub format, verified in a fresh process."""
