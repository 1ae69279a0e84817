"""Two checkpoints: which tensors belong together, what changed, and the change as an adapter."""
