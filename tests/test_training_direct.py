"""`gm.train` steps an optimizer without what torch puts around it, and nobody who looks there can tell."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import gramian as gm
from gramian.training.bare_steps import forget_gradients, step_of


def test_what_torch_puts_around_a_step_is_left_out_only_while_nobody_is_there() -> None:
    """Hooks of the optimizer and of all, a profiler, and a step that was replaced on it or on its class are seen."""

    class Plain(torch.optim.SGD):
        pass

    optimizer = Plain([torch.ones(2, requires_grad=True)], lr=0.1)
    step, seen = step_of(optimizer), []

    def note(*of: object) -> None:
        seen.append(len(of))

    entry = "Optimizer.step#Plain.step"
    with torch.autograd.profiler.profile() as profile:
        step()
    assert entry in {event.name for event in profile.function_events or ()}
    for register in (
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):
        handle = register(note)
        step()
        handle.remove()
        step()
    assert len(seen) == 4
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # which counts steps by a function around them
    step()
    assert optimizer._opt_called  # type: ignore[attr-defined]
    other = Plain([torch.ones(2, requires_grad=True)], lr=0.1)
    step, around = step_of(other), Plain.step
    Plain.step = functools.wraps(around)(note)  # type: ignore[method-assign]
    step()
    step_of(other)()
    other.__class__ = type("Noting", (torch.optim.SGD,), {"step": note})
    step()
    assert len(seen) == 7


def test_optimizers_that_are_found_otherwise_step_as_torch_has_it() -> None:
    """A proxy, a lookup of its own, hooks in another place, a class that torch wraps at `zero_grad` only."""
    seen: list[object] = []

    class Proxy:
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class Lookup(torch.optim.SGD):
        def __getattribute__(self, name: str) -> Any:
            return (lambda: seen.append(self)) if name == "step" else super().__getattribute__(name)

    class Late(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner, self.param_groups, self.defaults = inner, inner.param_groups, {}
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

        def step(self) -> None:  # type: ignore[override]
            self.inner.step()

    p = torch.ones(2, requires_grad=True)
    inner = torch.optim.SGD([p], lr=0.5)
    for made in (Proxy(inner), Late(inner)):
        step = step_of(made)  # type: ignore[arg-type]
        forget_gradients(made)  # type: ignore[arg-type]
        assert p.grad is None
        p.grad = torch.ones(2)
        step()
    assert p.tolist() == [0, 0]
    made.register_step_post_hook(lambda *of: seen.append(of))
    step()
    step_of(Lookup([p], lr=0.1))()
    step = step_of(inner)
    inner._optimizer_step_pre_hooks = OrderedDict()
    inner.register_step_pre_hook(lambda *of: seen.append(of))
    step()
    assert len(seen) == 3


def test_gradients_are_forgotten_as_the_optimizer_does_it() -> None:
    """Where `zero_grad` was replaced, on it or for all, and where a profiler of all threads makes a record of it."""
    seen: list[object] = []
    p = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.zero_grad = lambda set_to_none=True: seen.append(set_to_none)  # type: ignore[method-assign]
    forget_gradients(optimizer)
    del optimizer.zero_grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", lambda self: seen.append(self))
        forget_gradients(optimizer)
    assert seen == [True, optimizer]
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, experimental_config=everywhere) as profile:
        forget_gradients(optimizer)
        step_of(optimizer)()
    names = {event.name for event in profile.events() or ()}
    assert {"Optimizer.zero_grad#SGD.zero_grad", "Optimizer.step#SGD.step"} <= names


def test_a_scheduler_of_torchs_counts_the_steps_of_a_run() -> None:
    """Made with the optimizer or between two steps; torch warns only where it is stepped before the optimizer."""
    schedulers: list[LambdaLR] = []

    def made(model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedulers.append(LambdaLR(optimizer, lambda step: 1.0))
        return optimizer

    def on_step(run: gm.Run, share: float) -> None:
        if run.steps == 2:
            schedulers.append(LambdaLR(schedulers[0].optimizer, lambda step: 1.0))
        for scheduler in schedulers[: 1 + (run.steps > 2)] if run.steps else ():
            scheduler.step()

    batch = torch.ones(4, 3), torch.tensor([0, 1, 1, 1])
    task = gm.Task(lambda: torch.nn.Linear(3, 2), gm.Objective.classification(), lambda *of: [batch], lambda model: {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm.train(task, optimizer=made, steps=4, on_step=on_step)
    assert [scheduler.last_epoch for scheduler in schedulers[-2:]] == [4, 2]
    optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    step, scheduler = step_of(optimizer), LambdaLR(optimizer, lambda step: 1.0)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    step()
