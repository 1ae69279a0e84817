"""Bounds on what a low-rank approximation lacks, from what a Krylov space has seen of AᵀA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramian.linalg.engine import lapack
from gramian.linalg.engine.krylov import FAILURE
from gramian.linalg.engine.rounding import U, gamma, norm

DIRECT = 1e-3
"""The share of ‖A‖_F² below which the squared error cancels in the difference of squares, and is computed directly."""
SHADOW = 32
"""Random vectors for a lower bound on ‖A‖_F outside the space, where it is not known."""

Triple = tuple[Tensor, Tensor, Tensor]


def excess(
    factors: Triple, forth: Tensor, off: Tensor | float, square: Tensor, optimum: Tensor, unit: float, x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """An upper bound on (‖A − USVᵀ‖_F − optimum)/‖A‖_F, and ‖A − USVᵀ‖/‖A‖, from A V, known to within `off` in
    Frobenius norm, ‖A‖_F² and a lower bound on the optimum; with the dense `x`, also where the error is small.
    """
    u, s, v = factors
    captured, part = _captured(factors, forth)
    missed = (square - captured).clamp_min(0)
    reached = (missed + 8 * unit * (square + part) + 2 * norm(u * s[:, None, :]) * off).sqrt()
    size = square.sqrt()
    few = (missed < DIRECT * square) & (size > 0)
    for i in few.nonzero().flatten().tolist():
        if x is None:
            break
        scaled = u[i] * s[i]
        gap = torch.linalg.vector_norm(x[i].to(torch.float64) - scaled @ v[i].mT)
        missed[i] = gap**2
        reached[i] = gap + 2 * gamma(s.shape[-1] + 4) * (size[i] + scaled.norm() * v[i].norm())
    zero = (size == 0) & (s == 0).all(-1)
    bound = torch.where(zero, 0.0, ((reached - optimum).clamp_min(0) / size).nan_to_num(nan=math.inf))
    return bound, torch.where(size > 0, missed.sqrt() / size.clamp_min(2.0**-1000), 0.0)


def _captured(factors: Triple, forth: Tensor) -> tuple[Tensor, Tensor]:
    """‖A‖_F² − ‖A − USVᵀ‖_F² and ‖USVᵀ‖_F² (B,), from A V."""
    u, s, v = factors
    inner = ((forth * u).sum(-2) * s).sum(-1)
    part = ((u.mT @ u) * (v.mT @ v) * s[:, :, None] * s[:, None, :]).flatten(1).sum(1)
    return 2 * inner - part, part


def excess_of_unknown(
    factors: Triple, forth: Tensor, off: Tensor, most: Tensor, inside: Tensor, shadow: Tensor, unit: float
) -> tuple[Tensor, Tensor]:
    """As `excess` where ‖A‖_F is not known: it cancels from ‖A − USVᵀ‖_F² − optimum² ≤ `most` − captured.

    Elsewhere a lower bound on ‖A‖_F suffices: ‖AW‖_F² is at least `inside`, and ‖AP‖_F² is `shadow`, its estimate from
    `SHADOW` Gaussian vectors, over 1 + 2√(t/k) + 2t/k but with probability e^-t (Laurent and Massart, Ann. Statist. 28
    (2000), lemma 1).
    """
    u, s, _ = factors
    captured, part = _captured(factors, forth)
    t = -math.log(FAILURE)
    least = (inside + shadow / (1 + 2 * math.sqrt(t / SHADOW) + 2 * t / SHADOW)) * (1 - 8 * unit)
    more = (most - captured + 8 * unit * (norm(forth) ** 2 + part) + 2 * norm(u * s[:, None, :]) * off).clamp_min(0)
    low = (least - most).clamp_min(0)
    apart = more / ((low + more).sqrt() + low.sqrt()).clamp_min(2.0**-900)
    size, zero = least.clamp_min(0).sqrt(), (inside == 0) & (shadow == 0) & (s == 0).all(-1)
    bound = torch.where(zero, 0.0, (apart / size).nan_to_num(nan=math.inf))
    about = (inside + shadow).clamp_min(2.0**-900)
    return bound, ((inside + shadow - captured).clamp_min(0) / about).sqrt()


def leading_sum_bound(t: Tensor, coupling: Tensor, outside: Tensor, highest: Tensor, k: int) -> Tensor:
    """An upper bound on the sum of the k largest eigenvalues λⱼ ≤ `highest` of [[T, Rᵀ], [R, C]], from RᵀR and
    ‖C‖₂ ≤ `outside`.

    For μ > ‖C‖ as many eigenvalues are above μ as T + Rᵀ(μ − C)⁻¹R has above it (Haynsworth), and so λⱼ is at most the
    larger of μ and the j-th of T + RᵀR/(μ − outside); the least over a few μ is taken, for each j.
    """
    w = lapack.small_eigvalsh(t).flip(-1)
    room = (w[:, :k] - outside[:, None]).clamp_min(0)
    tiny = 1e-15 * w[:, :1].abs()
    size = norm(coupling).sqrt()[:, None]
    # Near the eigenvalues themselves, and closer to `outside` where it is as large as they are.
    taus = [(room[:, max(0, k * i // 8 - 1), None]).maximum(tiny + 1e-3 * size) for i in (4, 6, 7, 8)]
    taus += [(room[:, -1:] * share).maximum(tiny + 1e-3 * share * size) for share in (0.3, 1e-4)]
    tau = torch.cat(taus, -1)
    raised = t[:, None] + coupling[:, None] / tau.clamp_min(2.0**-900)[..., None, None]
    rounding = 8 * t.shape[-1] * U * torch.linalg.matrix_norm(raised)
    found = lapack.small_eigvalsh(raised).flip(-1)[..., :k] + rounding[..., None]
    each = torch.maximum(found, (outside[:, None] + tau)[..., None])
    return each.nan_to_num(nan=math.inf).amin(1).minimum(highest[:, None]).sum(-1)


def expected_loss(squares: Tensor, w: Tensor, k: int, outside: Tensor) -> Tensor:
    """Σ ‖rⱼ‖² / (wⱼ − outside): to second order, the sum of the k largest eigenvalues minus that of T's, w, where the
    norm outside the space is at most `outside` (B,).
    """
    return (squares / (w[:, -k:] - outside[:, None]).clamp_min(2.0**-900)).sum(-1)
