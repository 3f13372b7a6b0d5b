"""Recipes for people: the paper's table, and one recipe as a graph."""
