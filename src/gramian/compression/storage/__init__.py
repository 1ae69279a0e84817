"""Compressed models and plans in files."""
