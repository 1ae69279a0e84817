"""Questions that a change answers: another input, label, output, mode or step, and what the loss then does."""
