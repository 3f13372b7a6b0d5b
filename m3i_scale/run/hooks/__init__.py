"""Hooks of the training loop. Every rank runs the same hooks at the same points; each file has one purpose."""
