"""From a target to one compressed model, measured beside its alternatives."""
