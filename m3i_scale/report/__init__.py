"""Documents for people: tables of recipes, backbones, checkpoints, plans and findings, and a recipe as a graph."""
