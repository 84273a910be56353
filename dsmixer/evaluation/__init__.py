"""What the base, each expert, the uniform and the trained mixture reach on held-out examples."""
