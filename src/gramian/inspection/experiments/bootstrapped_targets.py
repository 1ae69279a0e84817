"""Targets that are made of another output of the network and of data, and have a gradient."""

from __future__ import annotations

from itertools import islice
from typing import Any

from torch import Tensor

from gramian.operators.cuts import nodes_of

__all__ = ["is_bootstrapped", "is_taught"]

# Nodes of a graph that are followed.
MOST = 3000


def is_bootstrapped(output: Tensor, target: Tensor) -> bool:
    """Whether a target is data plus what the parameters of the output make of other inputs, with its gradient.

    So are the returns of temporal differences, r + γ Q(s′), where nothing is detached. Values of one call, as a
    derivative and a function that are compared in an equation, share more than parameters.

    Args:
        output, target: what a loss compares.

    Returns: false where either has no gradient.
    Cost: a walk over the graphs.
    """
    if not (output.requires_grad and target.requires_grad) or output.ndim < 1 or output.shape != target.shape:
        return False
    root = target.grad_fn
    while root is not None and len(root.next_functions) == 1:  # reshaped
        root = root.next_functions[0][0]
    if root is None or not root.name().startswith("AddBackward") or all(n is not None for n, _ in root.next_functions):
        return False
    return _share_parameters(output, target)


def is_taught(output: Tensor, target: Tensor) -> bool:
    """Whether probabilities are compared with those that the same parameters make of other inputs, with their gradient.

    Args:
        output, target: what a loss compares.

    Returns: false where either has no gradient.
    Cost: a walk over the graphs.
    """
    return output.requires_grad and target.requires_grad and _share_parameters(output, target)


def _share_parameters(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share parameters, and nothing that was made of these."""
    first, second = _nodes(one), _nodes(other)
    if first is None or second is None:
        return False
    shared = [node for node in first & second if getattr(node, "variable", None) is None]
    return not shared and bool(first & second)


def _nodes(t: Tensor) -> set[Any] | None:
    found = set(islice(nodes_of(t), MOST + 1))
    return found if len(found) <= MOST else None
