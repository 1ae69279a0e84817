"""The factor of a loss in float16, whose smallest gradients would otherwise be zero."""

from __future__ import annotations

from typing import Any

__all__ = ["LossScale"]

# As torch's GradScaler. Powers of two, so that scaling and unscaling round nothing.
INITIAL, GROWTH_STEPS, SMALLEST = 2.0**16, 2000, 1.0


class LossScale:
    """The factor of the loss: half after a gradient that is not finite, twice after 2,000 steps without one.

    Where it is one already, the gradient itself is at fault.

    Args:
        active: whether to scale at all; if not, the factor is one and stays.

    >>> scale = LossScale()
    >>> scale.overflowed(), scale.value
    (True, 32768.0)
    """

    def __init__(self, *, active: bool = True) -> None:
        self.active = active
        self.value = INITIAL if active else 1.0
        self.steps = 0  # since the last change

    def overflowed(self) -> bool:
        """Note a gradient that is not finite; whether the factor was at fault, and is smaller now."""
        if not self.active or self.value <= SMALLEST:
            return False
        self.value, self.steps = self.value / 2, 0
        return True

    def stepped(self) -> None:
        """Note a step that was taken."""
        if not self.active:
            return
        self.steps += 1
        if self.steps == GROWTH_STEPS:
            self.value, self.steps = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        """Return the factor and its steps, for `restore`."""
        return {"value": self.value, "steps": self.steps} if self.active else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        if self.active:
            self.value, self.steps = float(state["value"]), int(state["steps"])
