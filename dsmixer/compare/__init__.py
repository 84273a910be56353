"""Comparisons: variants of a recipe and other methods on several seeds, run as cells and gathered."""
