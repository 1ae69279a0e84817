"""A compressed model's layers, fit to what the original's put out."""
