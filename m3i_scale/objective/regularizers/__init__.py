"""Regularizers prevent the collapse of target representations: the entropy term of equation (2)."""
