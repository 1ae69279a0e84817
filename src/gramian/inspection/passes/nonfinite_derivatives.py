"""Which operation's derivative is the first that is not finite: a backward pass, looked at node by node."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from gramian.batch import tensors
from gramian.inspection.passes.current_module import Follower
from gramian.recording.hooks import hooks

__all__ = ["first_infinite_derivative", "first_zero_derivative", "gradients_of"]

# Operations whose derivative is zero, everywhere or where values are at an end.
_FLAT = frozenset((
    "round", "sign", "sgn", "floor", "ceil", "trunc", "heaviside", "normal", "bernoulli", "clamp", "clamp_min",
    "clamp_max", "hardtanh", "hardsigmoid", "minimum", "maximum",
))  # fmt: skip


def first_infinite_derivative(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[str, str] | None:
    """Name the first operation of a backward pass that gets finite gradients and gives others.

    Args:
        model: whose modules are named; its `.grad` are left as they were.
        forward: makes a scalar from a forward pass of the model. Random state and buffers are the caller's to keep.

    Returns: the module's name, or "loss" for what is computed outside of the model, and the operation; `None` where all
        gradients are finite.
    Raises: what `forward` raises.
    Cost: a forward and a backward pass, with a synchronization at each node of the graph.
    Source: this library's own; as torch.autograd.detect_anomaly, but it goes on to no traceback, and names the module.

    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False))
    >>> first_infinite_derivative(net, lambda: net(torch.zeros(1, 1)).sqrt().sum())
    ('loss', 'sqrt')
    """
    return _first(model, forward, lambda operation, inward, outward: _all_finite(outward) and not _all_finite(inward))


def first_zero_derivative(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[str, str] | None:
    """Name the first operation of a backward pass that lets nothing of a gradient pass, as rounding does.

    Args:
        model, forward: as in `first_infinite_derivative`.

    Returns: the module's name, or "loss", and the operation; `None` where no such operation does.
    Raises: what `forward` raises.
    Cost: as `first_infinite_derivative`.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> first_zero_derivative(net, lambda: net(torch.ones(1, 1)).round().sum())
    ('loss', 'round')
    """
    return _first(
        model,
        forward,
        lambda operation, inward, outward: (
            operation in _FLAT and any(t is not None for t in inward) and not _any(inward) and _any(outward)
        ),
    )


def _first(model: nn.Module, forward: Callable[[], Tensor], is_it: Callable[..., bool]) -> tuple[str, str] | None:
    """The first operation of a backward pass of which this is true, of its name and the gradients it gives and gets."""
    places = _Places(model)
    with torch.enable_grad(), places.installed():
        scalar = forward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if scalar.grad_fn is None or not parameters:
        return None
    found: list[tuple[str, str]] = []
    handles = [
        node.register_hook(_looker(place, node, found, is_it)) for node, place in _walked(scalar.grad_fn, places.made)
    ]
    with hooks(handles):
        torch.autograd.grad(scalar, parameters, allow_unused=True)
    return found[0] if found else None


def gradients_of(loss: Tensor, wanted: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of a loss, also of one that runs a backward pass of its own, while it is made or differentiated.

    Such passes, as in a reversible block, leave gradients in `.grad`; those are taken, and `.grad` is `None` then.

    Args:
        loss: a scalar.
        wanted: leaves, with no `.grad` before the loss was made.

    Returns: a gradient each; `None` where the loss does not depend on it.
    Raises: what the backward pass raises.
    Cost: a backward pass.

    >>> w = torch.ones(2, requires_grad=True)
    >>> loss = (w * w).sum()
    >>> loss.backward()
    >>> gradients_of(loss, [w])[0].tolist()
    [2.0, 2.0]
    """
    try:
        nodes = () if loss.grad_fn is None else (node for node, _ in _walked(loss.grad_fn, {}))
        if any("CheckpointFunction" in node.name() for node in nodes):
            loss.backward()  # use_reentrant=True, which refuses to be told what is wanted
            found: Sequence[Tensor | None] = [None] * len(wanted)
        else:
            found = torch.autograd.grad(loss, list(wanted), allow_unused=True)
    except RuntimeError:
        if all(p.grad is None for p in wanted):
            raise
        found = [None] * len(wanted)  # the loss was differentiated already, and its graph is gone
    result = [p.grad if grad is None else grad for p, grad in zip(wanted, found, strict=True)]
    for p in wanted:
        p.grad = None
    return result


class _Places(Follower):
    """Keeps in which module each node of the graph was made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.made: dict[Node, str] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.stack:
            with torch._C.DisableTorchFunction():
                for t in tensors(result):
                    if t.grad_fn is not None:
                        self.made.setdefault(t.grad_fn, self.place)
        return result


def _walked(root: Node, made: Mapping[Node, str]) -> Iterator[tuple[Node, str]]:
    """Each node with the module that made it; those within a function are in the module of what uses them."""
    known = {root}
    waiting = [(root, made.get(root, "loss"))]
    while waiting:
        node, place = waiting.pop()
        yield node, place
        for parent, _ in node.next_functions:
            if parent is not None and parent not in known:
                known.add(parent)
                waiting.append((parent, made.get(parent, place)))


def _looker(place: str, node: Node, found: list[tuple[str, str]], is_it: Callable[..., bool]) -> Callable:
    name = re.sub(r"(Backward)?\d*$", "", node.name().rpartition("::")[2])
    operation = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()

    def look(inward: tuple[Tensor | None, ...], outward: tuple[Tensor | None, ...]) -> None:
        if not found and is_it(operation, inward, outward):
            found.append((place, operation))

    return look


def _all_finite(values: tuple[Tensor | None, ...]) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in values)


def _any(values: tuple[Tensor | None, ...]) -> bool:
    return any(t is not None and bool(t.any()) for t in values)
