"""`zero_grad()` and `step()` of an optimizer, without torch's entries for its profiler where nobody profiles.

These entries, and the look for hooks, take a step of a small network longer than the look at its gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["forget_gradients", "step_of"]

# Of what torch puts around the `step` of every optimizer's class.
AROUND = Optimizer.profile_hook_step(lambda: None).__code__


def forget_gradients(optimizer: Optimizer) -> None:
    """As `optimizer.zero_grad()`."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:  # it does more
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def step_of(optimizer: Optimizer) -> Callable[[], Any]:
    """A function that does what `optimizer.step()` does.

    What torch puts around an optimizer's own `step`, a record for its profiler and hooks before and after, is left out
    while there is none of them; also where they come or go during a run.

    >>> parameter = torch.ones(1, requires_grad=True)
    >>> optimizer = torch.optim.SGD([parameter], lr=0.5)
    >>> parameter.grad = torch.ones(1)
    >>> step_of(optimizer)()
    >>> parameter.item()
    0.5
    """
    kind = type(optimizer)
    around = kind.step
    own = getattr(around, "__wrapped__", None) if getattr(around, "__code__", None) is AROUND else None
    of_all = sys.modules[Optimizer.__module__]
    names = [f"{of}_{when}_hooks" for of in ("_global_optimizer", "_optimizer_step") for when in ("pre", "post")]
    hooks = [getattr(of_all, name, getattr(optimizer, name, None)) for name in names]
    if own is None or None in hooks:  # another torch keeps them elsewhere
        return lambda: optimizer.step()
    attributes = vars(optimizer)

    def step() -> Any:
        if any(hooks) or torch.autograd._profiler_enabled() or "step" in attributes or kind.step is not around:
            return optimizer.step()
        return own(optimizer)

    return step
