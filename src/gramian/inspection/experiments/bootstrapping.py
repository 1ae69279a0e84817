"""Targets that are made of another output of the network and of data, and have a gradient."""

from __future__ import annotations

from itertools import islice
from typing import Any

from torch import Tensor

from gramian.operators.cuts import nodes_of

__all__ = ["is_bootstrapped"]

# Nodes of a graph that are followed.
MOST = 3000


def is_bootstrapped(output: Tensor, target: Tensor) -> bool:
    """Whether a target is data plus what the parameters of the output make of other inputs, with its gradient.

    So are the returns of temporal differences, r + γ Q(s′), where nothing is detached. Values of one call, as a
    derivative and a function that are compared in an equation, share more than parameters.

    Args:
        output, target: what a loss compares.

    Returns: false where either has no gradient.
    Raises: nothing of its own.
    Cost: a walk over the graphs.
    Source: this library's own.
    """
    if not (output.requires_grad and target.requires_grad) or output.ndim < 1 or output.shape != target.shape:
        return False
    root = target.grad_fn
    while root is not None and len(root.next_functions) == 1:  # reshaped
        root = root.next_functions[0][0]
    if root is None or not root.name().startswith("AddBackward") or all(n is not None for n, _ in root.next_functions):
        return False
    one, two = _nodes(output), _nodes(target)
    if one is None or two is None:
        return False
    shared = [node for node in one & two if getattr(node, "variable", None) is None]
    return not shared and bool(one & two)


def _nodes(t: Tensor) -> set[Any] | None:
    found = set(islice(nodes_of(t), MOST + 1))
    return found if len(found) <= MOST else None
