"""Fine-tuning of backbones with published recipes."""
