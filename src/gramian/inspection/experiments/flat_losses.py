"""Losses whose slope is below what optimizers see, wherever the outputs are."""

from __future__ import annotations

import torch

from gramian.inspection.across_depth import ADAMW_EPS
from gramian.inspection.experiments.replay import Asked

__all__ = ["largest_slope"]

# Outputs that are drawn.
DRAWS = 4


def largest_slope(asked: Asked) -> float | None:
    """The largest sum of the loss's gradients by its outputs, as they are and drawn at random.

    With layers that keep the size of a signal, no gradient of a parameter is larger.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: the sum of the absolute values; `None` where outputs are not known, or the loss is no number with them.
    Raises: what the model raises.
    Cost: four evaluations of the loss and its gradient where the first is below AdamW's ε, else none.
    """
    replay = asked.replay
    if not replay.is_known or not replay.outputs or not asked.seen.needs_gradient:
        return None

    def of(gradients: list[torch.Tensor]) -> float:
        return sum(float(g.double().abs().sum()) for g in gradients)

    largest = of(replay.slopes)
    if not largest < ADAMW_EPS:
        return largest
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        outputs = []
        for t in replay.outputs:
            is_probability = bool((t >= 0).all()) and bool((t <= 1).all())
            draw = torch.rand if is_probability else torch.randn
            outputs.append(
                draw(t.shape, generator=generator).to(t) * (1.0 if is_probability else 1.0 + float(t.abs().max()))
            )
        largest = max(largest, of(replay.gradients(outputs)))
    return largest
