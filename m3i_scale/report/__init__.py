"""Output for people: tables of recipes, backbones, checkpoints, plans and environment checks, and recipe graphs."""
