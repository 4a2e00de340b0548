"""Sampling answers from the weights that train."""
