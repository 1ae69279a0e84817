"""Fewer heads, units and channels: found by what they change, removed where the loss notices least."""
