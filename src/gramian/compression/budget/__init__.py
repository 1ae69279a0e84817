"""One budget for the whole model: what each layer keeps of it, and what that costs the loss."""
