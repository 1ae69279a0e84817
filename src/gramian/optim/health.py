"""How an optimizer fares: steps that were skipped, and what the kept state says about each matrix."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gramian import linalg
from gramian.optim.batches import State

__all__ = ["Row", "Skipped", "measure"]

Row = dict[str, int | float | None]

NUM_COUNTERS = 64  # on the device, before they are added up


class Skipped:
    """Counts the steps that parameters skip, on the device, without waiting for it."""

    def __init__(self) -> None:
        self._counters: dict[tuple[str, ...], Tensor] = {}  # by the names of the parameters that step together
        self._past: Counter[str] = Counter()
        self._last: list[tuple[Sequence[Tensor], Tensor]] = []

    def begin(self) -> None:
        """A new step."""
        self._last = []

    def add(self, names: Sequence[str], params: Sequence[Tensor], bad: Tensor) -> None:
        """Notes which of the parameters are skipped in this step, (P,)."""
        self._last.append((params, bad))
        key = tuple(names)
        if key not in self._counters and len(self._counters) >= NUM_COUNTERS:
            self._past = self.counts()
            self._counters = {}
        self._counters[key] = self._counters.get(key, 0) + bad.long()

    def last(self) -> dict[Tensor, Tensor]:
        """Whether each parameter was skipped in this step."""
        return {p: flag for params, bad in self._last for p, flag in zip(params, bad.unbind(), strict=True)}

    def counts(self) -> Counter[str]:
        """By name; waits for the device."""
        total = self._past.copy()
        for names, skipped in self._counters.items():
            total.update(dict(zip(names, skipped.tolist(), strict=True)))
        return total


def measure(state: State, options: Mapping[str, Any], detail: str) -> Row:
    """The numbers of one parameter's matrices; see `MatrixOptimizer.health`."""
    row: Row = {"fallbacks": int(state["fallbacks"].sum()) if "fallbacks" in state else 0 if state else None}
    if detail == "counts":
        return row
    if not state:
        return row | {"condition": None, "effective_rank": None, "drift": None}
    flat = {name: value.reshape(-1, *value.shape[-2:]) for name, value in state.items()}
    sigma = linalg.svdvals_ex(flat["momentum"])[0].double()
    share = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    drift = _drift(flat, options)
    return row | {
        "condition": float(torch.where(sigma[:, -1] > 0, sigma[:, 0] / sigma[:, -1], math.inf).max()),
        "effective_rank": float(torch.special.entr(share).sum(-1).exp().min()),
        "drift": None if drift is None else float(drift.max()),
    }


def _drift(state: State, options: Mapping[str, Any]) -> Tensor | None:
    """How far what is kept is from what it would be if it were made anew, from 0 to 1, of each matrix."""
    sides = [side for side in ("left", "right") if f"{side}_moment" in state]
    found = []
    for side in sides:
        moment = state[f"{side}_moment"].double()
        if f"{side}_basis" in state:
            off = moment - torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1))
            found.append(_norm(off) / _norm(moment).clamp_min(torch.finfo(moment.dtype).tiny))
        elif f"{side}_root" in state:
            size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            scaled = moment / size.clamp_min(torch.finfo(moment.dtype).tiny)
            now = linalg.inv_root_ex(scaled, 2 * len(sides), damping=options["damping"])[0]
            found.append(_sine(state[f"{side}_root"].double(), now))
    if "direction" in state:
        found.append(_sine(state["direction"].double(), linalg.polar_ex(state["momentum"].double())[0]))
    return torch.stack(found).amax(0) if found else None


def _sine(kept: Tensor, now: Tensor) -> Tensor:
    """Of the angle between two matrices, one where it is a right angle or more."""
    a, b = (x / _norm(x)[:, None, None].clamp_min(torch.finfo(x.dtype).tiny) for x in (kept, now))
    cosine = (a * b).sum((-2, -1))
    # From the difference, since 1 − cos² would lose half of the digits.
    return torch.where(cosine > 0, _norm(a - cosine[:, None, None] * b), 1.0)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1))
