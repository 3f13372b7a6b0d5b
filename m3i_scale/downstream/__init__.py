"""Measure what a backbone is worth: fine-tuning by published protocols."""
