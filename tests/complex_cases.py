"""Hostile complex matrices, and oracles in complex arithmetic, which know nothing of real forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import torch
from torch import Tensor

import gramian.linalg as gl
from cases import hostile_for, mp, seeded
from gramian import random

Exact = mpmath.matrix | None


def hostile_complex(needs: str, seed: int, count: int, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """`hostile_for` between random unitary matrices, and so of the same spectrum; Hermitian for "psd".

    Every fourth keeps its zeros and its scaling, and has random phases instead. Of the Hermitian every eighth is moved
    by about one rounding.
    """
    a = hostile_for(needs, seed, count, m, n, torch.float64)
    g = seeded(seed + 7)
    u, v = (random.orthogonal(count, k, k, generator=g, dtype=torch.complex128) for k in (m, n))
    p, q = (torch.exp(2j * math.pi * torch.rand(count, k, generator=g, dtype=torch.float64)) for k in (m, n))
    if needs == "psd":
        v, q = u, p
    finite = a.isfinite().flatten(1).all(1)[:, None, None]
    dense = torch.where(finite, a, 0.0).to(torch.complex128)
    kept = (torch.arange(count) % 4 == 0)[:, None, None]
    x = torch.where(kept, p[:, :, None] * dense * q[:, None, :].conj(), u @ dense @ v.mH)
    if needs == "psd":
        x = (x + x.mH) / 2
        moved = x * (1 + torch.finfo(dtype).eps * torch.randn(x.shape, generator=g, dtype=torch.complex128))
        x = torch.where((torch.arange(count) % 8 == 3)[:, None, None], moved, x)
    return torch.where(finite, x, a).to(dtype)


def mpc(x: Tensor) -> mpmath.matrix:
    """The matrix exactly, in 60 digits."""
    return mpmath.matrix([[mpmath.mpc(z.real, z.imag) for z in row] for row in x.to(torch.complex128).tolist()])


def _svd(x: Tensor) -> tuple[mpmath.matrix, list, mpmath.matrix]:
    """U, σ and Vᴴ of a matrix with no more columns than rows."""
    u, s, v = mpmath.svd_c(mpc(x))
    return u, list(s), v


def _sizes(x: Tensor) -> list:
    return sorted(_svd(x if x.shape[-2] >= x.shape[-1] else x.mH)[1], reverse=True)


def _tall(function: Callable[[Tensor], Exact]) -> Callable[[Tensor], Exact]:
    """The same for wide matrices, through the adjoint."""

    def either(x: Tensor) -> Exact:
        if x.shape[-2] >= x.shape[-1]:
            return function(x)
        y = function(x.mH)
        return None if y is None else y.H

    return either


def _polar(x: Tensor) -> Exact:
    u, s, v = _svd(x)
    return u * v if min(s) > max(s) * mpmath.mpf(10) ** -45 else None


def _pseudoinverse(x: Tensor) -> Exact:
    u, s, v = _svd(x)
    return v.H * mpmath.diag([1 / z if z > CUT * max(s) else mpmath.mpf(0) for z in s]) * u.H


def _inverse(x: Tensor) -> Exact:
    m = mpc(x)
    try:
        y = m**-1
    except (ZeroDivisionError, TypeError):  # a zero pivot; a column that is all zero
        return None
    return y if mpmath.norm(m) * mpmath.norm(y) < mpmath.mpf(10) ** 40 else None


def _solution(x: Tensor) -> Exact:
    y = _inverse(x)
    return None if y is None else y * mpmath.matrix([1] * x.shape[-1])


def _cond(x: Tensor) -> Exact:
    s = _sizes(x)
    return mpmath.matrix([[s[0] / s[-1]]]) if s[-1] > s[0] * mpmath.mpf(10) ** -22 else None


def _of_eigenvalues(power: float, definite: bool) -> Callable[[Tensor], Exact]:
    """The power of the Hermitian part, rounded as in the library; eigenvalues negative up to rounding count as zero."""

    def exact(x: Tensor) -> Exact:
        x, eps = x.to(torch.complex128), torch.finfo(x.dtype).eps
        w, v = mpmath.eighe(mpc(x / 2 + x.mH / 2))
        top = max(abs(e) for e in w)
        least = top * mpmath.mpf(10) ** -45 if definite else -20 * x.shape[0] * eps * top
        if min(w) < least or (definite and not min(w) > 0):
            return None
        return v * mpmath.diag([mpmath.power(e, power) if e > 0 else mpmath.mpf(0) for e in w]) * v.H

    return exact


def _number(result: tuple[Tensor, gl.Certificate]) -> tuple[Tensor, gl.Certificate]:
    return result[0][..., None, None], result[1]


def _column(result: tuple[Tensor, gl.Certificate]) -> tuple[Tensor, gl.Certificate]:
    return result[0][..., None], result[1]


def _scaled(x: Tensor) -> Tensor:
    """Times a power of two, with entries near one, whose exponential does not overflow."""
    peak = torch.view_as_real(x).abs().amax((-3, -2, -1))[..., None, None]  # of parts: it is not rounded
    return x * torch.exp2(-torch.frexp(peak.double()).exponent.clamp(-120, 120)).to(x.dtype)


def _lapack_polar(a: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(a, full_matrices=False)
    return u @ v


def _lapack_power(power: float) -> Callable[[Tensor], Tensor]:
    def function(m: Tensor) -> Tensor:
        w, v = torch.linalg.eigh(m)
        return (v * w.clamp_min(0) ** power) @ v.mH

    return function


def _lapack_exp(m: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(_scaled(m))


CUT = 1e-5
"""What counts as zero for the pseudoinverse, relative to σ₁."""

COMPLEX: dict[str, tuple] = {
    "inv": (gl.inv_ex, _inverse, torch.linalg.inv, "square"),
    "solve": (
        lambda m: gl.solve_ex(m, torch.ones_like(m[..., :1])),
        _solution,
        lambda m: torch.linalg.solve(m, torch.ones_like(m[..., :1])),
        "square",
    ),
    "polar": (gl.polar_ex, _tall(_polar), _lapack_polar, "general"),
    "svdvals": (
        lambda a: _column(gl.svdvals_ex(a)),
        lambda x: mpmath.matrix(_sizes(x)),
        lambda a: torch.linalg.svdvals(a)[..., None],
        "general",
    ),
    "spectral_norm": (
        lambda a: _number(gl.spectral_norm_ex(a)),
        lambda x: mpmath.matrix([[_sizes(x)[0]]]),
        lambda a: torch.linalg.matrix_norm(a, 2)[..., None, None],
        "general",
    ),
    "cond": (lambda a: _number(gl.cond_ex(a)), _cond, lambda a: torch.linalg.cond(a)[..., None, None], "general"),
    "pinv": (
        lambda a: gl.pinv_ex(a, tolerance=CUT),
        _tall(_pseudoinverse),
        lambda a: torch.linalg.pinv(a, rtol=CUT),
        "general",
    ),
    "inv_root": (lambda m: gl.inv_root_ex(m, 4), _of_eigenvalues(-0.25, True), _lapack_power(-0.25), "psd"),
    "sqrtm": (gl.sqrtm_ex, _of_eigenvalues(0.5, False), _lapack_power(0.5), "psd"),
    "expm": (lambda m: gl.expm_ex(_scaled(m)), lambda x: mpmath.expm(mpc(_scaled(x))), _lapack_exp, "square"),
}
"""name: (certified function, oracle, plain LAPACK in complex128, the matrices it takes)."""


def complex_error(value: Tensor, exact: Exact) -> float:
    """As `cases.mp_error`, of complex values too."""
    if exact is None or not bool(value.isfinite().all()):
        return math.inf
    size = mpmath.norm(exact)
    if not size:
        return math.inf if bool(value.any()) else 0.0
    error = float(mpmath.norm((mpc(value) if value.is_complex() else mp(value)) - exact) / size)
    return error if error > 1e-25 else 0.0


def score_complex(name: str, seed: int, count: int, dtype: torch.dtype, rtol: float) -> tuple[Any, ...]:
    """As `cases.score`, of complex matrices."""
    function, oracle, lapack, needs = COMPLEX[name]
    shapes = [(3, 3), (5, 5), *([(6, 3), (3, 5)] if needs == "general" else [])]
    silent, ratios, flagged, met = [], [], 0, 0
    for i, (m, n) in enumerate(shapes):
        a = hostile_complex(needs, seed + i, count, m, n, dtype)
        value, certificate = function(a)
        bounds, converged = certificate.error_bound.tolist(), certificate.converged.tolist()
        for j in range(count):
            exact = oracle(a[j]) if bool(a[j].isfinite().all()) else None
            error = complex_error(value[j], exact)
            if error > bounds[j] * (1 + 1e-12):
                silent.append((m, n, j, error, bounds[j]))
            if converged[j] and error > 0:
                ratios.append(bounds[j] / error)
            if exact is not None:
                plain = complex_error(lapack(a[j].to(torch.complex128)), exact)
                met += plain <= rtol
                flagged += plain <= rtol and not converged[j]
    return silent, ratios, flagged, met


def score_against_complex128(name: str, seed: int, n: int, count: int) -> tuple[Any, ...]:
    """As `score_complex`, in complex64, with the complex128 answer and its own bound as the oracle."""
    function, _, _, needs = COMPLEX[name]
    a = hostile_complex(needs, seed, count, n, n, torch.complex64)
    value, certificate = function(a)
    exact, reference = function(a.to(torch.complex128))
    own, size = reference.error_bound, torch.linalg.vector_norm(exact, dim=(-2, -1))
    known = reference.converged & (size > 0)
    error = torch.linalg.vector_norm(value - exact, dim=(-2, -1)) / size
    bound, converged = certificate.error_bound, certificate.converged
    wrong = known & ~(error <= bound * (1 + 1e-12) + own)
    # A singular matrix, or one that is not finite, must not converge; what complex128 leaves open says nothing.
    wrong |= converged & ~a.isfinite().flatten(1).all(1)
    silent = [(n, n, j, float(error[j]), float(bound[j])) for j in wrong.nonzero().flatten().tolist()]
    good = known & converged & (error > own)
    return silent, (bound / error)[good].tolist(), int((known & ~converged).sum()), int(known.sum())
