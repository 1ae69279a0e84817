"""Bounds what one gradient can do to a momentum.

A momentum that takes in a gradient 10⁶ times too large points along it until it has faded, for ln 10⁶ / (1 − μ) steps:
270 at μ = 0.95. So a gradient counts for ten times the usual size at most. The usual size follows the gradients in
logarithm, and grows by 15 % a step at most: while wild gradients of every size come, it stays near the ordinary ones.
Where all gradients have become larger for good, they prevail in the momentum after a few steps all the same, since each
counts for ten times the old ones.

AdamW's second moments, which step what is no hidden matrix, would keep the square of such a gradient for longer still.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gramian.linalg.engine.scaling import peak
from gramian.optim.stacks import State

__all__ = ["init", "limit_", "limited"]

MOST = 10.0
"""Times the usual size that a gradient may count for."""

FOLLOW = 0.2
"""Share of the way, in logarithm, from the usual size to that of a new gradient."""

SLOWEST, FASTEST = -1.0, 0.2
"""Powers of two by which the usual size moves in a step, at least and at most."""


def init(m: Tensor) -> State:
    """The usual size of the gradients' largest entries, for matrices like `m`; zero before the first."""
    return {"usual": m.new_zeros(m.shape[0], 1, 1)}


def limit_(g: Tensor, state: State) -> None:
    """Scales down, in place, each gradient (K, m, n) that is larger than ten times the usual; zeros change nothing."""
    factor = _counted(peak(g, (-2, -1)), state["usual"])
    if g.device.type != "cpu" or bool((factor < 1).any()):
        g.mul_(factor)


def limited(grads: Sequence[Tensor], sizes: Tensor, usual: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients, each scaled down where its size (P,) is more than ten times the usual, which is of no dimension.

    Those of the user stay as they are. On a CPU nothing is copied where nothing is larger.
    """
    together = torch.stack(list(usual))
    factor = _counted(sizes.clamp_max(torch.finfo(sizes.dtype).max), together)
    torch._foreach_copy_(list(usual), together.unbind())
    if sizes.device.type != "cpu":
        return torch._foreach_mul(list(grads), factor.unbind())
    return [g if f == 1 else g * f for g, f in zip(grads, factor.tolist(), strict=True)]


def _counted(size: Tensor, usual: Tensor) -> Tensor:
    """The share of each gradient that counts, one at most; the usual sizes, of the same shape, follow in place."""
    known, given = usual > 0, size > 0
    ratio = size / torch.where(known, usual, size)  # infinite where it overflows
    move = (FOLLOW * ratio.log2()).clamp_(SLOWEST, FASTEST).exp2_()
    usual.copy_(torch.where(given, torch.where(known, usual * move, size), usual))
    return torch.where(given, (MOST / ratio).clamp_max_(1.0), 1.0)
