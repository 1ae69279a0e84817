"""A model that does not fit into memory, part by part from its files."""
