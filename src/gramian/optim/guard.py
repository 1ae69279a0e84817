"""Bounds what one gradient can do to a momentum.

A momentum that takes in a gradient 10⁶ times too large points along it until it has faded, for ln 10⁶ / (1 − μ) steps:
270 at μ = 0.95. So a gradient counts for ten times the usual size at most. The usual size follows the gradients in
logarithm, and grows by 15 % a step at most: while wild gradients of every size come, it stays near the ordinary ones.
Where all gradients have become larger for good, they prevail in the momentum after a few steps all the same, since each
counts for ten times the old ones.

The other end: a direction is as long for a gradient that has vanished, since the training data are fitted, as for any
other, and would lead the weights away at full speed. So a step is shorter where the usual size is less than a hundredth
of the largest that it had, which is forgotten by 2 % a step.

AdamW's second moments, which step what is no hidden matrix, would keep the square of such a gradient for longer still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.linalg.engine.scaling import peak
from gramian.optim.stacks import State

__all__ = ["init", "is_ordinary", "limit_", "limited", "vanished"]

MOST = 10.0
"""Times the usual size that a gradient may count for."""

FOLLOW = 0.2
"""Share of the way, in logarithm, from the usual size to that of a new gradient."""

SLOWEST, FASTEST = 0.5, 2**0.2
"""Factors by which the usual size moves in a step, at least and at most."""


LITTLE = 0.01
"""Of the largest usual size: what gradients may fall to before steps are shorter."""

FORGET = 0.98
"""Factor by which the largest usual size falls in a step."""


def init(m: Tensor) -> State:
    """The usual size of the gradients' largest entries, for matrices like `m`, and the largest that it had; both zero
    before the first.
    """
    return {key: m.new_zeros(m.shape[0], 1, 1) for key in ("usual", "most")}


def vanished(state: State) -> Tensor | None:
    """By how much steps are shorter, (K, 1, 1), since gradients have vanished; `None` on a CPU if none are.

    To be asked once a step, after the usual sizes have followed; the largest ones follow here.
    """
    usual, most = state["usual"], state["most"]
    torch.maximum(most.mul_(FORGET), usual, out=most)
    if usual.is_cpu and all(
        now >= LITTLE * top for ((now,),), ((top,),) in zip(usual.tolist(), most.tolist(), strict=True)
    ):
        return None
    return usual.div(LITTLE * most).nan_to_num_(1.0).clamp_max_(1.0)  # NaN before the first gradient


def is_ordinary(g: Tensor, state: State) -> bool:
    """Whether gradients (K, m, n) on a CPU are known to be finite and need no limit; their usual sizes follow then."""
    return g.is_cpu and _are_ordinary(peak(g, (-2, -1)), state["usual"])


def limit_(g: Tensor, state: State) -> None:
    """Scales down, in place, each gradient (K, m, n) that is larger than ten times the usual; zeros change nothing."""
    ratio = _compared(peak(g, (-2, -1)), state["usual"])
    # A GPU is not asked, since that would wait for it.
    if g.device.type != "cpu" or float(ratio.amax()) > MOST:
        g.mul_(_share(ratio))


def limited(grads: list[Tensor], sizes: Tensor, usual: Tensor) -> list[Tensor]:
    """The gradients, each scaled down where its size (P,) is more than ten times the usual (P,).

    Those of the user stay as they are, and nothing is copied where nothing is larger. The usual sizes follow in place.
    """
    if sizes.is_cpu and _are_ordinary(sizes, usual):
        return grads
    ratio = _compared(sizes.clamp_max(torch.finfo(sizes.dtype).max), usual)
    if float(ratio.amax()) <= MOST:  # on a GPU too, which has just been asked which gradients are finite
        return grads
    return [g if share == 1 else g * share for g, share in zip(grads, _share(ratio).tolist(), strict=True)]


def _are_ordinary(size: Tensor, usual: Tensor) -> bool:
    """Whether all sizes are as usual, none of them zero or NaN; the usual sizes then follow, as in `_compared`."""
    ratio = size / usual
    if not all(0 < value <= MOST for value in ratio.view(-1).tolist()):
        return False
    usual.mul_(ratio.pow_(FOLLOW).clamp_(SLOWEST, FASTEST))
    return True


def _compared(size: Tensor, usual: Tensor) -> Tensor:
    """How many times the usual each size is, infinite where that overflows; the usual sizes follow in place.

    One for a gradient of zeros, which changes nothing, and for the first one that is not.
    """
    known = torch.where(usual > 0, usual, size)
    ratio = torch.where(size > 0, size / known, 1.0)
    torch.mul(known, ratio.pow(FOLLOW).clamp_(SLOWEST, FASTEST), out=usual)
    return ratio


def _share(ratio: Tensor) -> Tensor:
    """The share of each gradient that counts."""
    return (MOST / ratio).clamp_max_(1.0)
