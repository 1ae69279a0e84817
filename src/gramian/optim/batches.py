"""Matrices of one shape, stacked: so that every product of a step is one batched product."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.optim.routing import Route

__all__ = ["Batch", "Batches", "State", "alike"]

State = dict[str, Tensor]

BUCKET_BYTES = 256 << 20  # of matrices in one batch: its stack of gradients is a copy


def alike(routes: Sequence[Route]) -> list[list[Route]]:
    """Routes by the shape and dtype of their matrices and the device, in batches of bounded size.

    Experts and fused projections join the plain matrices of their shape.
    """
    kinds: dict[tuple, list[list[Route]]] = {}
    sizes: dict[tuple, int] = {}  # of the last bucket of each kind
    for r in routes:
        p = r.parameter
        kind = (_matrices(r)[-2:], p.dtype, p.device)
        if kind not in kinds or sizes[kind] > BUCKET_BYTES:
            kinds.setdefault(kind, []).append([])
            sizes[kind] = 0
        kinds[kind][-1].append(r)
        sizes[kind] += 4 * p.numel()
    return [bucket for buckets in kinds.values() for bucket in buckets]


class Batch:
    """K matrices (m, n), of one or more parameters, and their state as tensors `(K, …)`.

    Each parameter's own state is a view of these, of shape `(*its count of matrices, …)`, so that what changes here
    changes there. `fresh` (K,) says which matrices lacked a part of their state before this step.
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
        self.phases = torch.zeros(self.shape[0], dtype=torch.long)  # in which step of a cycle each matrix is due
        for name, stack in self.state.items():
            parts = zip(self.routes, self.views, stack.split(self.counts), self.fresh.split(self.counts), strict=True)
            for r, views, view, fresh in parts:
                views[name] = view.view(*_matrices(r)[:-2], *stack.shape[1:])
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
        """Whether the present state of its parameters lies here."""
        return all(states.get(r.parameter) is views for r, views in zip(self.routes, self.views, strict=True))

    def stack(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The matrices (K, m, n) of one tensor for each parameter, copied; zeros for `None`."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for r, tensor, into in zip(self.routes, tensors, out.split(self.counts), strict=True):
            if tensor is None:
                into.zero_()
            else:
                into.view(_matrices(r)).copy_(r.layout.split(tensor))  # type: ignore[union-attr]
        return out

    def unstack(self, matrices: Tensor) -> list[Tensor]:
        """One tensor for each parameter, of its shape, from matrices (K, m, n); views where layouts allow."""
        parts = zip(self.routes, matrices.split(self.counts), strict=True)
        return [r.layout.join(part.view(_matrices(r))) for r, part in parts]  # type: ignore[union-attr]

    def repeat(self, values: Tensor) -> Tensor:
        """One value for each matrix, (K, 1, 1), from one for each parameter."""
        counts = torch.tensor(self.counts, device=values.device)
        return values.repeat_interleave(counts, output_size=self.shape[0]).view(-1, 1, 1)


class Batches(NamedTuple):
    """The batches of the parameters of a group, made for a `refresh` of so many steps."""

    routes: list[Route]
    refresh: int
    batches: list[Batch]

    def hold(self, routes: list[Route], refresh: int, states: Mapping[Tensor, State]) -> bool:
        """Whether these are their batches still, with their present state."""
        return routes == self.routes and refresh == self.refresh and all(b.holds(states) for b in self.batches)


def _matrices(r: Route) -> tuple[int, ...]:
    assert r.layout is not None
    return r.layout.matrices
