"""Which parameters lead to the input of another module: those that do not are a network's last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["Leading"]


class Leading:
    """Goes back from the inputs of modules through autograd's graph, by each node once, and touches no value.

    Attributes:
        found: the parameters' names.

    Args:
        names: of the model's parameters, by id.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        self.found: set[str] = set()
        self.passed: set[Any] = set()

    def clear(self) -> None:
        """Lets go of the pass's graph."""
        self.passed.clear()

    def lead(self, given: Iterable[Tensor], module: nn.Module) -> None:
        """Notes what the tensors that a module is given depend on, where it has parameters of its own."""
        if not any(True for _ in module.parameters(recurse=False)):
            return
        ahead: list[Any] = [t.grad_fn for t in given if t.grad_fn is not None]
        while ahead:
            node = ahead.pop()
            if node is None or node in self.passed:
                continue
            self.passed.add(node)
            variable = getattr(node, "variable", None)
            if id(variable) in self.names:
                self.found.add(self.names[id(variable)])
            ahead += [n for n, _ in node.next_functions]
