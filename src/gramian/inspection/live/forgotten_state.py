"""An optimizer that begins each step without the state that the step before left."""

from __future__ import annotations

from torch.optim import Optimizer

from gramian.report import Finding

__all__ = ["Forgetting"]

# Steps in a row: one alone is how some methods start anew.
ANEW = 3


class Forgetting:
    """Follows the size of the optimizer's state from step to step.

    Args:
        optimizer: that steps, or `None`.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.optimizer = optimizer
        self._left = 0  # parameters that had a state after the last step
        self._count = 0

    def before_step(self, step: int) -> list[Finding]:
        """The finding that the state is empty again, when it was so at several steps in a row."""
        self._count = self._count + 1 if self._left and not self._size() else 0
        if self._count != ANEW:
            return []
        return [
            Finding(
                "state-lost",
                "warning",
                "The optimizer forgets its state after each step",
                where="optimizer",
                evidence=f"{self._left} parameters had a state after step {step}, and none has one now, as at the "
                f"{ANEW - 1} steps before (exact)",
                cause="The loop clears optimizer.state, or loads an empty one, at every step: momentum is lost, and "
                "Adam's steps are the signs of the gradients.",
                advice="Leave optimizer.state alone. Make and load the optimizer once, before the loop.",
            )
        ]

    def after_step(self) -> None:
        """Notes the state that a step left."""
        self._left = self._size()

    def _size(self) -> int:
        return len(getattr(self.optimizer, "state", None) or ())
