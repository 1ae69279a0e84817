"""Matrices of one shape, stacked, so that every product of a step is one batched product."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.optim.routing import Route

__all__ = ["Stack", "Stacks", "State", "alike"]

State = dict[str, Tensor]

MAX_BYTES = 256 << 20  # of matrices in one stack, whose gradients are copied


def alike(routes: Sequence[Route]) -> list[list[Route]]:
    """Routes grouped by the shape and dtype of their matrices and by device, in groups of bounded size.

    Experts and fused projections join the plain matrices of their shape.
    """
    kinds: dict[tuple, list[list[Route]]] = {}
    sizes: dict[tuple, int] = {}  # of the last group of each kind
    for r in routes:
        p = r.parameter
        kind = (_matrices(r)[-2:], p.dtype, p.device)
        if kind not in kinds or sizes[kind] > MAX_BYTES:
            kinds.setdefault(kind, []).append([])
            sizes[kind] = 0
        kinds[kind][-1].append(r)
        sizes[kind] += 4 * p.numel()
    return [group for groups in kinds.values() for group in groups]


class Stack:
    """K matrices (m, n) of one or more parameters, and their state as tensors `(K, …)`.

    The state of each parameter is a view of these, of shape `(*its number of matrices, …)`, so that both change
    together. `fresh` (K,) says which matrices lacked a part of their state before this step.
    """

    def __init__(
        self, routes: Sequence[Route], init: Callable[[Tensor], State], states: Mapping[Tensor, State]
    ) -> None:
        self.routes = tuple(routes)
        self.counts = [math.prod(_matrices(r)[:-2]) for r in routes]
        self.shape = (sum(self.counts), *_matrices(self.routes[0])[-2:])
        p = self.routes[0].parameter
        like = torch.empty((), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        self.dtype, self.device = like.dtype, like.device
        self.state = init(like.expand(self.shape))
        self.views: list[State] = [{} for _ in routes]
        self.fresh = torch.zeros(self.shape[0], dtype=torch.bool)
        self.phases = torch.zeros(self.shape[0], dtype=torch.long)  # the step of a cycle in which each matrix is due
        for name, buffer in self.state.items():
            parts = zip(self.routes, self.views, buffer.split(self.counts), self.fresh.split(self.counts), strict=True)
            for r, views, view, fresh in parts:
                views[name] = view.view(*_matrices(r)[:-2], *buffer.shape[1:])
                known = states.get(r.parameter, {}).get(name)
                if known is None:
                    fresh.fill_(True)
                elif known.shape != views[name].shape:
                    raise InputError(
                        f"the state {name!r} of {r.name!r} has shape {tuple(known.shape)}, but this optimizer with its "
                        f"options needs {tuple(views[name].shape)}. Load the state of the same optimizer, and keep the "
                        "options that set a shape, such as rank"
                    )
                else:
                    views[name].copy_(known)

    def holds(self, states: Mapping[Tensor, State]) -> bool:
        """Whether the present state of its parameters lies here, in the dtype and on the device that they have now."""
        wide = torch.promote_types(self.routes[0].parameter.dtype, torch.float32)
        kind = {(r.parameter.dtype, r.parameter.device) for r in self.routes}
        same = len(kind) == 1 and (wide, self.routes[0].parameter.device) == (self.dtype, self.device)
        return same and all(states.get(r.parameter) is views for r, views in zip(self.routes, self.views, strict=True))

    def stacked(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """A copy of one tensor for each parameter, as matrices (K, m, n); zeros for `None`."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for r, tensor, into in zip(self.routes, tensors, out.split(self.counts), strict=True):
            if tensor is None:
                into.zero_()
            else:
                into.view(_matrices(r)).copy_(r.layout.split(tensor))  # type: ignore[union-attr]
        return out

    def unstacked(self, matrices: Tensor) -> list[Tensor]:
        """Matrices (K, m, n) as one tensor for each parameter, of its shape; views where layouts allow."""
        parts = zip(self.routes, matrices.split(self.counts), strict=True)
        return [r.layout.join(part.view(_matrices(r))) for r, part in parts]  # type: ignore[union-attr]

    def repeated(self, values: Tensor) -> Tensor:
        """One value for each matrix, (K, 1, 1), from one for each parameter."""
        counts = torch.tensor(self.counts, device=values.device)
        return values.repeat_interleave(counts, output_size=self.shape[0]).view(-1, 1, 1)


class Stacks(NamedTuple):
    """The stacks of a parameter group, made for a `refresh` of so many steps."""

    routes: list[Route]
    refresh: int
    stacks: list[Stack]

    def fit(self, routes: list[Route], refresh: int, states: Mapping[Tensor, State]) -> bool:
        """Whether they can be used again: for the same parameters and `refresh`, and with their present state."""
        return routes == self.routes and refresh == self.refresh and all(s.holds(states) for s in self.stacks)


def _matrices(r: Route) -> tuple[int, ...]:
    assert r.layout is not None
    return r.layout.matrices
