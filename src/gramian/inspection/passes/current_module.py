"""A forward pass, followed: which module the computation is in when a function is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["Follower"]


class Follower(TorchFunctionMode):
    """A torch function mode that knows the module in which a function is called; for subclasses.

    Attributes:
        stack: names of the modules whose forward runs, the innermost last.

    Args:
        model: whose passes are followed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.stack: list[str] = []

    @property
    def place(self) -> str:
        """The innermost module; empty for the model, and outside of it."""
        return self.stack[-1] if self.stack else ""

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Those that are followed: scripted ones take no hooks."""
        return ((n, m) for n, m in self.model.named_modules() if not isinstance(m, torch.jit.ScriptModule))

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """A context in which it follows."""
        handles: list[Any] = []
        for name, module in self.modules():
            handles.append(module.register_forward_pre_hook(self.entering(name), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self.leaving(name), always_call=True, with_kwargs=True))
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def entering(self, name: str) -> Callable:
        """The hook for before a module's call."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(name)
            self.entered(name, module, args, kwargs)

        return hook

    def leaving(self, name: str) -> Callable:
        """The hook for after it."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.stack:
                self.stack.pop()
            self.returned(name, module, args, kwargs, output)

        return hook

    def entered(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is called."""

    def returned(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """It has given its output, or `None` where it raised."""
