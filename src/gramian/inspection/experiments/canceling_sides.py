"""Whether the two sides of a difference or quotient are one function, so that it is one number whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.inspection.passes.gate_functions import DIFFERENCES, QUOTIENTS, REVERSED

__all__ = ["canceled"]

_LOSSES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
# Differences below this share of one side are rounding, and so are gradients.
ROUNDING = 1e-5


def canceled(func: Callable, args: tuple, model: nn.Module) -> str:
    """What cancels in a call: equal values on both sides, each with a gradient, of which nothing is left together.

    So is exp(log p − log p), where the second is to be the probability of the policy that acted, without a gradient.

    Args:
        func, args: the call.
        model: whose parameters the sides are made of.

    Returns: what is made of the two sides, in words; empty where they differ, or one of them has no gradient.
    Cost: two backward passes where both sides have a gradient and are equal; else a comparison at most.
    """
    words = "difference" if func in DIFFERENCES or func in REVERSED else "quotient" if func in QUOTIENTS else ""
    words = words or (func.__name__ if func in _LOSSES else "")
    if not words or len(args) < 2 or not all(isinstance(t, Tensor) and t.requires_grad for t in args[:2]):
        return ""
    one, other = args[:2]
    if one.shape != other.shape or one.numel() < 2 or not _are_equal(one.detach(), other.detach()):
        return ""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        with torch.enable_grad():
            by = torch.randn(one.shape, generator=torch.Generator().manual_seed(0)).to(one)
            own = _size(torch.autograd.grad(one, wanted, by, retain_graph=True, allow_unused=True))
            left = _size(torch.autograd.grad(one - other, wanted, by, retain_graph=True, allow_unused=True))
    except RuntimeError:  # reentrant checkpoints, which refuse to be told what is wanted
        return ""
    return words if left <= ROUNDING * own and own > 0 else ""


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether values that are not all one number are the same, up to rounding."""
    return torch.allclose(one, other, rtol=ROUNDING, atol=0) and bool((one != one.flatten()[0]).any())


def _size(gradients: Sequence[Tensor | None]) -> float:
    return max((float(g.abs().amax()) for g in gradients if g is not None and g.numel()), default=0.0)
