"""`zero_grad()` and `step()` of an optimizer, without torch's entries for its profiler where nobody profiles.

These entries, and the look for hooks, take a step of a small network longer than the look at its gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler
from torch.optim import Optimizer

__all__ = ["forget_gradients", "step_of"]

OF_ALL = sys.modules[Optimizer.__module__]  # which has the hooks of all optimizers
ZERO_GRAD = Optimizer.zero_grad

# Of what torch puts around the `step` of every class of optimizers, and all names in it: another torch may do more.
AROUND = Optimizer.profile_hook_step(lambda: None).__code__
NAMES = {
    *("__class__", "__name__", "Optimizer", "cast", "chain", "isinstance", "len", "tuple", "values", "RuntimeError"),
    *("torch", "autograd", "profiler", "record_function", "_optimizer_step_code"),
    *("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"),
    *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
}


def is_profiled() -> bool:
    """Whether a profiler of torch's runs, in this thread or in all of them."""
    return torch.autograd._profiler_enabled() or profiler._is_profiler_enabled


def forget_gradients(optimizer: Optimizer) -> None:
    """As `optimizer.zero_grad()`."""
    if (
        getattr(type(optimizer), "zero_grad", None) is not ZERO_GRAD  # it does more
        or "zero_grad" in vars(optimizer)
        or not hasattr(optimizer, "_zero_grad_profile_name")  # torch then puts something around `step` here
        or is_profiled()
    ):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def step_of(optimizer: Optimizer) -> Callable[[], Any]:
    """A function that does what `optimizer.step()` does.

    What torch puts around an optimizer's own `step`, a record for its profiler and hooks before and after, is left out
    while there is none of them; also where they come or go during a run. Traces that torch takes without a profiler of
    Python's (`ExecutionTraceObserver`, Kineto's daemon) lack the record.

    >>> parameter = torch.ones(1, requires_grad=True)
    >>> optimizer = torch.optim.SGD([parameter], lr=0.5)
    >>> parameter.grad = torch.ones(1)
    >>> step_of(optimizer)()
    >>> parameter.item()
    0.5
    """
    around = getattr(type(optimizer), "step", None)
    own = getattr(around, "__wrapped__", None)
    if own is None or not _is_all_around(optimizer):
        return lambda: optimizer.step()
    attributes = vars(optimizer)

    def step() -> Any:
        if (
            OF_ALL._global_optimizer_pre_hooks
            or OF_ALL._global_optimizer_post_hooks
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or is_profiled()
            or "step" in attributes
            or type(optimizer).step is not around
        ):
            return optimizer.step()
        return own(optimizer)

    return step


def _is_all_around(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step` is what torch puts around a class's own, and that is no more than is known here."""
    kind = type(optimizer)
    return (
        getattr(kind.step, "__code__", None) is AROUND
        and NAMES.issuperset(AROUND.co_names)
        and kind._optimizer_step_code is Optimizer._optimizer_step_code
        and kind.__getattribute__ is object.__getattribute__
    )
