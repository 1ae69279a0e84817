"""Health of an optimizer: which steps were skipped, and what its state says about each matrix."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gramian import linalg
from gramian.linalg.engine.scaling import peak
from gramian.optim.recipe import Recipe
from gramian.optim.route import Route
from gramian.optim.stacks import State

__all__ = ["Row", "Skipped", "measure", "sine"]

Row = dict[str, int | float | None]

NUM_COUNTERS = 64  # kept on the device before they are added up


class Skipped:
    """Counts the steps that parameters skip, on the device, without synchronizing with it."""

    def __init__(self) -> None:
        self._counters: dict[tuple[str, ...], Tensor] = {}  # by the names of the parameters that step together
        self._past: Counter[str] = Counter()
        self._last: list[tuple[Sequence[Tensor], Tensor | None]] = []

    def begin(self) -> None:
        """A new step."""
        self._last = []

    def add(self, params: Sequence[Tensor], bad: Tensor | None, routes: Mapping[Tensor, Route]) -> None:
        """Notes which of the parameters are skipped in this step, (P,); `None` for none."""
        self._last.append((params, bad))
        if bad is None:
            return
        key = tuple(routes[p].name for p in params)
        if key not in self._counters and len(self._counters) >= NUM_COUNTERS:
            self._past = self.counts()
            self._counters = {}
        self._counters[key] = self._counters.get(key, 0) + bad.long()

    def last(self) -> dict[Tensor, Tensor]:
        """Whether each parameter was skipped in this step."""
        flags: dict[Tensor, Tensor] = {}
        for params, bad in self._last:
            none = (torch.zeros((), dtype=torch.bool, device=p.device) for p in params)
            flags.update(zip(params, none if bad is None else bad.unbind(), strict=True))
        return flags

    def counts(self) -> Counter[str]:
        """Skipped steps by name; synchronizes with the device."""
        total = self._past.copy()
        for names, skipped in self._counters.items():
            total.update(dict(zip(names, skipped.tolist(), strict=True)))
        return total


def measure(state: State, recipe: Recipe, options: Mapping[str, Any], detail: str) -> Row:
    """The numbers of one parameter's matrices; see `MatrixOptimizer.health`."""
    counter = state.get(recipe.fallbacks or "")
    row: Row = {"fallbacks": None if not state else 0 if counter is None else int(counter.sum())}
    if detail == "counts":
        return row
    row |= {"condition": None, "effective_rank": None, "drift": None}
    flat = {name: value.reshape(-1, *value.shape[-2:]) for name, value in state.items()}
    momentum = flat.get(recipe.momentum or "")
    if momentum is not None:
        size = peak(momentum, (-2, -1))  # entries near the largest number would overflow in a singular value
        sigma = linalg.svdvals_ex(momentum / torch.where(size > 0, size, 1.0))[0].double()
        share = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        row["condition"] = float(torch.where(sigma[:, -1] > 0, sigma[:, 0] / sigma[:, -1], math.inf).max())
        row["effective_rank"] = float(torch.special.entr(share).sum(-1).exp().min())
    staleness = recipe.staleness(flat, options) if flat and recipe.staleness is not None else None
    if staleness is not None:
        row["drift"] = float(staleness.max())
    return row


def sine(kept: Tensor, now: Tensor) -> Tensor:
    """The sine of the angle between two matrices, for each pair `(K, m, n)`; one for a right angle or more."""
    a, b = (x / _norm(x).clamp_min(torch.finfo(x.dtype).tiny) for x in (kept, now))
    cosine = (a * b).sum((-2, -1), keepdim=True)
    # From the difference, since 1 − cos² would lose half of the digits.
    return torch.where(cosine > 0, _norm(a - cosine * b), 1.0)[:, 0, 0]


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
