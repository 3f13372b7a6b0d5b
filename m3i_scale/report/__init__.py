"""Output for people: HTML report, terminal dashboard, tables of recipes, plans and environment checks."""
