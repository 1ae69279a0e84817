"""Matrices of one shape, stacked: so that every product of a step is one batched product."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gramian.optim.routing import Route

__all__ = ["Batch", "State", "alike"]

State = dict[str, Tensor]

BUCKET_BYTES = 256 << 20  # of matrices in one batch: its stack of gradients is a copy


def alike(routes: Sequence[Route]) -> list[list[Route]]:
    """Routes by the shape and dtype of their matrices and the device, in batches of bounded size.

    Experts and fused projections join the plain matrices of their shape.
    """
    kinds: dict[tuple, list[list[Route]]] = {}
    for r in routes:
        assert r.layout is not None
        p = r.parameter
        buckets = kinds.setdefault((r.layout.matrices[-2:], p.dtype, p.device), [[]])
        if sum(x.parameter.numel() for x in buckets[-1]) * 4 > BUCKET_BYTES:
            buckets.append([])
        buckets[-1].append(r)
    return [bucket for buckets in kinds.values() for bucket in buckets]


class Batch:
    """K matrices (m, n), of one or more parameters, and their state as tensors `(K, …)`.

    Each parameter's own state is a view of these, of shape `(*its count of matrices, …)`, so that what changes here
    changes there. `fresh` says that at least one parameter had no state before.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        init: Callable[[Tensor], State],
        states: Mapping[Tensor, State],
    ) -> None:
        self.routes = tuple(routes)
        self.counts = [math.prod(_matrices(r)[:-2]) for r in routes]
        self.shape = (sum(self.counts), *_matrices(self.routes[0])[-2:])
        p = self.routes[0].parameter
        like = torch.empty((), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        self.dtype, self.device = like.dtype, like.device
        self.state = init(like.expand(self.shape))
        self.views: list[State] = [{} for _ in routes]
        self.fresh = False
        self.stagger = 0  # the cycle for which `phases` says when each matrix is due
        self.phases = torch.zeros(self.shape[0], dtype=torch.long)
        for name, stack in self.state.items():
            for r, views, view in zip(self.routes, self.views, stack.split(self.counts), strict=True):
                views[name] = view.view(*_matrices(r)[:-2], *stack.shape[1:])
                known = states.get(r.parameter, {}).get(name)
                if known is None:
                    self.fresh = True
                else:
                    views[name].copy_(known)

    def holds(self, routes: Sequence[Route], states: Mapping[Tensor, State]) -> bool:
        """Whether this is the batch of just these parameters, and their present state lies here."""
        return len(routes) == len(self.routes) and all(
            r is own and states.get(r.parameter) is views
            for r, own, views in zip(routes, self.routes, self.views, strict=True)
        )

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The matrices (K, m, n) of one tensor for each parameter, copied."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for r, tensor, into in zip(self.routes, tensors, out.split(self.counts), strict=True):
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


def _matrices(r: Route) -> tuple[int, ...]:
    assert r.layout is not None
    return r.layout.matrices
