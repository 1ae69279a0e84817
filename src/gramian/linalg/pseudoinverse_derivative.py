"""The derivative of the pseudoinverse at a fixed rank."""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.linalg.engine.derivative import Arguments, Given, Rule, Tangents, Values, only
from gramian.linalg.engine.singular_vectors import singular_vectors
from gramian.linalg.engine.transforms import pullback, with_plain


def _along(arguments: Arguments, values: Values, e: Tensor) -> Tensor:
    """The derivative of A† along E."""
    a, y, rank = arguments["a"].double(), values[0].double(), values[1]
    least = min(a.shape[-2:])
    deficient: list[bool] = []
    with_plain(lambda rank: deficient.append(bool((rank < least).any())), rank)
    return _of_lower_rank(a, e, rank) if deficient[0] else _of_full_rank(a, y, e)


def _of_full_rank(a: Tensor, y: Tensor, e: Tensor) -> Tensor:
    """By Golub and Pereyra; one of the projections is the identity."""
    out = -(y @ e @ y)
    if a.shape[-2] > a.shape[-1]:
        outside = e.mT - (e.mT @ a) @ y
        return out + y @ (y.mT @ outside)
    if a.shape[-2] < a.shape[-1]:
        outside = e.mT - y @ (a @ e.mT)
        return out + (outside @ y.mT) @ y
    return out


def _of_lower_rank(a: Tensor, e: Tensor, rank: Tensor) -> Tensor:
    """By the divided differences of η(σ) = 1/σ for the values that count and 0 for the others, finite at ties."""
    u, s, v = singular_vectors(a)
    kept = torch.arange(s.shape[-1], device=s.device) < rank[..., None]
    eta = torch.where(kept, 1 / torch.where(kept, s, 1.0), 0.0)
    row, column, first, second = s[..., :, None], s[..., None, :], eta[..., :, None], eta[..., None, :]
    across = kept[..., :, None] != kept[..., None, :]
    gap, total = (torch.where(across, x, 1.0) for x in (row - column, row + column))
    even = torch.where(across, (first - second) / gap, -first * second)
    odd = torch.where(across, (first + second) / total, first * second)
    inner = u.mT @ e @ v
    core = even * (inner + inner.mT) / 2 + odd * (inner - inner.mT) / 2
    out = v @ core.mT @ u.mT
    square = eta.square()[..., None, :]
    if a.shape[-2] > a.shape[-1]:
        image = e @ v
        return out + (v * square) @ (image - u @ (u.mT @ image)).mT
    if a.shape[-2] < a.shape[-1]:
        back = e.mT @ u
        return out + (back - v @ (v.mT @ back)) * square @ u.mT
    return out


def _vjp(arguments: Arguments, values: Values, given: Given) -> dict[str, Tensor]:
    zero = torch.zeros_like(arguments["a"], dtype=torch.float64)
    return {"a": pullback(lambda e: _along(arguments, values, e), zero)[1](only(given))[0]}


def _jvp(arguments: Arguments, values: Values, tangents: Tangents) -> Given:
    e = tangents["a"]
    assert e is not None
    return (_along(arguments, values, e.double()), None)


PSEUDOINVERSE = Rule(_vjp, _jvp)
"""dA† = −A†EA† + A†A†ᵀEᵀ(I − AA†) + (I − A†A)EᵀA†ᵀA† where the rank is full. Golub and Pereyra, SIAM J. Numer. Anal.
10 (1973), (4.12). The transpose of the derivative is its pullback: it is linear in E."""
