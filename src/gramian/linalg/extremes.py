"""The largest singular value and the condition number, without all the singular values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import probes
from gramian.linalg.batch import check, choose, exponent_of, load, norm, scale
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.krylov import (
    FAILURE,
    Krylov,
    default_generator,
    gaussian,
    lanczos,
    orthonormal,
    times,
    top_bound,
    top_within,
)
from gramian.linalg.linear_map import LinearMap, ScaledMap, TensorMap, as_linear_map, is_dense
from gramian.linalg.singular import svd_values_twofold
from gramian.linalg.twofold import U
from gramian.linalg.verdict import Number, numbers

SMALL = 128
"""Up to this smaller side all singular values cost less than the Krylov method's calls."""
BLOCK = 1
"""Starting vectors. MKL takes twenty times as long for a matrix times four vectors as for one (2048², float32)."""
MAX_STEPS = 160

Apply = Callable[[Tensor], Tensor]


def _largest(apply: Apply, start: Tensor, rtol: float) -> tuple[Tensor, Tensor, Krylov]:
    """√θ and √(upper bound) of a positive semi-definite operator's largest eigenvalue."""

    def stop(found: Krylov) -> bool:
        return bool(top_within(found, 2 * rtol).all())

    found = lanczos(apply, start, MAX_STEPS, stop=stop, every=3)
    theta, high = top_bound(found)
    return theta.clamp_min(0).sqrt(), high.clamp_min(0).sqrt(), found


def _start(generator: torch.Generator | None, like: Tensor, n: int, batch: int) -> Tensor:
    return gaussian(default_generator(generator), like, 1, n, min(BLOCK, n)).expand(batch, -1, -1)


def _top(x: Tensor, rtol: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Krylov]:
    """σ₁ from below and a bound on |σ₁ − that|, by Lanczos on AᵀA with products in x's dtype.

    With D = AᵀAW − WT − FE_qᵀ, what rounding added, there is a symmetric Δ, ‖Δ‖ ≤ √2 ‖D‖_F, for which
    (AᵀA − Δ)W = WT + FE_qᵀ; `top_bound` holds of AᵀA − Δ, and ‖D‖_F is seen from its products with random vectors.
    """
    start = _start(generator, x, x.shape[-1], x.shape[0])
    low, high, found = _largest(lambda y: times(x.mT, times(x, y)), start, 0.7 * rtol)
    if x.dtype == torch.float64:
        return low, high - low, found
    p = found.t.shape[-1]
    seen = probes.probes(p, x.device)
    omega = seen.omega.expand(x.shape[0], -1, -1)
    exact = probes.apply_transposed(x, probes.apply(x, times(found.basis, omega)))
    ours = times(found.basis, found.t @ omega) + found.residual @ omega[:, -found.block :]
    blur = math.sqrt(2) * probes.of_norm(exact - ours, seen)
    above = ((high**2 + blur).sqrt() - low).clamp_min(0)
    return low, torch.maximum(above, low - (low**2 - blur).clamp_min(0).sqrt()), found


def norm_by_lanczos(x: Tensor, *, rtol: float, generator: torch.Generator | None) -> Number:
    """By Lanczos on AᵀA from a random start, in x's dtype, and in float64 where its rounding hides rtol."""
    low, error, found = _top(x, rtol, generator)
    poor = (error > rtol * (low - error).clamp_min(0)).nonzero().flatten()
    if x.dtype != torch.float64 and poor.numel():
        low[poor], error[poor], found = _top(x[poor].to(torch.float64), rtol, generator)
    none = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    return Number(low, error, none, found.t.shape[-1] // found.block, FAILURE)


def norm_by_svdvals(x: Tensor, *, rtol: float, generator: torch.Generator | None) -> Number:
    """By all singular values, with their certificate."""
    x = x.to(torch.float64)
    found = svd_values_twofold(x, decline=math.inf)
    if not x.shape[-1]:
        return Number(x.new_zeros(x.shape[0]), found.error * 0, found.reason)
    return Number(found.value[:, 0], found.error, found.reason)


SPECTRAL_NORM: dict[str, Callable[..., Number]] = {"lanczos": norm_by_lanczos, "svdvals": norm_by_svdvals}


def _norm_of_map(a: Any, rtol: float, generator: torch.Generator | None) -> tuple[Tensor, Certificate]:
    """The same of a map, scaled first by what it makes of one random block; its own rounding is added."""
    if isinstance(a, TensorMap):
        a = TensorMap(a.a.to(torch.float64))
    n = a.shape[1]
    own = ScaledMap(a)
    like = torch.empty(0, dtype=torch.float64, device=own.device)
    start = gaussian(default_generator(generator), like, n, min(BLOCK, n))
    zero = like.new_zeros(1)
    finite, exponent, value = True, torch.zeros(1, dtype=torch.long), Number(zero, zero, zero)
    if min(a.shape):
        image = own.matmat(start)[None]
        finite = bool(image.isfinite().all())
        exponent = exponent_of(image.nan_to_num(posinf=0.0))
        scaled = ScaledMap(a, float(scale(torch.ones(1, dtype=torch.float64), -exponent.cpu())))
        back = scaled.adjoint()
        if finite:
            low, high, found = _largest(lambda y: back.matmat(scaled.matmat(y[0]))[None], start[None], rtol / 2)
            rounding = 16 * torch.finfo(own.dtype).eps * low
            value = Number(low, high - low + rounding, low * 0, found.t.shape[-1] // found.block, FAILURE)
            finite = bool(low.isfinite())
    flags = torch.tensor([finite], device=own.device)
    family = {"lanczos": lambda x, rtol: value._replace(reason=torch.zeros_like(value.value, dtype=torch.long))}
    x = like.new_zeros(1, 1, 1)
    return numbers(family, ["lanczos"], rtol, torch.float64, x, flags, (), lambda v, _: scale(v, exponent))


@torch.no_grad()
def spectral_norm_ex(
    a: Float[Tensor, "*b m n"] | LinearMap,
    *,
    method: str = "auto",
    rtol: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "*b"], Certificate]:
    """`spectral_norm` with its certificate, never raising for a matrix's values.

    >>> value, certificate = spectral_norm_ex(torch.diag(torch.tensor([3.0, 4.0])))
    >>> value.item(), certificate.converged.item()
    (4.0, True)
    """
    choose("spectral_norm", method, SPECTRAL_NORM)
    if not isinstance(a, Tensor) or not is_dense(a):
        linear = as_linear_map("spectral_norm", a)
        return _norm_of_map(linear, default_rtol(rtol, getattr(linear, "dtype", torch.float32)), generator)
    check("spectral_norm", a)
    batch = load(a.mT if a.shape[-2] < a.shape[-1] else a)
    names = [method]
    if method == "auto":
        names = ["svdvals"] if batch.raw.shape[-1] <= SMALL else ["lanczos", "svdvals"]
    if not batch.raw.shape[-1]:
        names = ["svdvals"]
    return numbers(
        SPECTRAL_NORM,
        names,
        default_rtol(rtol, a.dtype),
        a.dtype,
        batch.at(None) if names[0] == "lanczos" else batch.x,
        batch.finite,
        batch.shape,
        lambda value, rows: scale(value, batch.exponent[rows]),
        generator=generator,
    )


def spectral_norm(
    a: Float[Tensor, "*b m n"] | LinearMap,
    *,
    method: str = "auto",
    rtol: float | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*b"]:
    """The largest singular value, ‖A‖₂ = max ‖Ax‖ / ‖x‖.

    Arguments: `a` (..., m, n) dense, a sparse matrix (m, n), or a `LinearMap`; `method`, one of `SPECTRAL_NORM` or
    "auto"; `rtol`, the relative error asked for (`certificate.RTOL` of the dtype if None); `generator` of the random
    start, a fixed seed if None. A map's answer is float64.
    Raises: `ShapeError`, `DtypeError`; `ConvergenceError` where the error bound is above rtol.
    Cost: "lanczos", 4·(10 to 60) products with a vector; "svdvals", used up to a side of 128 and where Lanczos does not
    reach rtol, one SVD. Accuracy: the Ritz value is never above ‖A‖₂ but for rounding; the error bound of "lanczos" is
    an estimate that fails with probability `krylov.FAILURE` over the start.
    Source: van Dorsselaer, Hochstenbach, van der Vorst, SIAM J. Matrix Anal. Appl. 22 (2000), §3.

    >>> spectral_norm(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]))
    tensor(2.)
    """
    value, certificate = spectral_norm_ex(a, method=method, rtol=rtol, generator=generator)
    require_converged("spectral_norm", certificate)
    return value


def _permutation(pivots: Tensor, n: int) -> Tensor:
    """The rows (B, n, 1) that LAPACK's exchanges bring to each place, without the n² entries of P."""
    orders = []
    for swaps in pivots.tolist():
        order = list(range(n))
        for i, other in enumerate(swaps):
            order[i], order[other - 1] = order[other - 1], order[i]
        orders.append(order)
    return torch.tensor(orders, device=pivots.device).reshape(-1, n, 1)


def cond_by_lanczos(x: Tensor, *, rtol: float, generator: torch.Generator | None) -> Number:
    """σ₁ by Lanczos on AᵀA and σ_n by Lanczos on (AᵀA)⁻¹ through LU (of R, from QR, where A is not square).

    σ_n ≤ ‖Av‖ for the Ritz vector v; σ_n ≥ 1/√(upper bound) − ‖A − LU‖, the last from random vectors.
    """
    b, m, n = x.shape
    square = torch.linalg.qr(x, mode="r").R if m != n else x
    lu, pivots, info = torch.linalg.lu_factor_ex(square)
    singular = info != 0
    eye = torch.eye(n, dtype=x.dtype, device=x.device)
    if bool(singular.any()):
        lu[singular] = eye
    start = _start(generator, x, n, b)
    low, high, top = _largest(lambda y: times(square.mT, times(square, y)), start, rtol / 4)

    def inverse(y: Tensor) -> Tensor:
        # Without a batch LAPACK reads the factors where they lie.
        if b == 1:
            half = torch.linalg.lu_solve(lu[0], pivots[0], y[0], adjoint=True)
            return torch.linalg.lu_solve(lu[0], pivots[0], half)[None]
        return torch.linalg.lu_solve(lu, pivots, torch.linalg.lu_solve(lu, pivots, y, adjoint=True))

    _, small_high, bottom = _largest(inverse, start, 0.6 * rtol)
    _, v = torch.linalg.eigh(bottom.t)
    ritz = orthonormal(times(bottom.basis, v[:, :, -1:]))
    reached = norm(times(square, ritz))
    omega = gaussian(default_generator(generator), x, 1, n, 8).expand(b, -1, -1)
    image = times(lu.triu(), omega)
    image = image + times(lu.tril(-1), image)
    gap = norm(image - times(square, omega).gather(-2, _permutation(pivots, n).expand(-1, -1, 8))) / math.sqrt(8)
    solved = torch.linalg.lu_solve(lu, pivots, omega)
    gap = gap + norm(times(square, solved) - omega) / norm(solved).clamp_min(2.0**-1000)
    # ‖E‖_F² is χ²₈/8 of what the probes show, which is below 1/100 of it with probability 1e-8; QR's error as well.
    lowest = 1 / small_high - 10 * gap - (8 * m * U * norm(x) if m != n else 0.0)
    value = low / reached
    error = torch.where(lowest > 0, torch.maximum(high / lowest - value, value - low / reached), math.inf)
    # Rounding of ‖Av‖ itself, relative to a σ_n that may be small.
    error = error + value * (4 * n * U * high / reached + 8 * U)
    lost = singular | ~value.isfinite() | ~error.isfinite()
    value = torch.where(singular, math.inf, value)
    reason = torch.where(lost, cert.INACCURATE, cert.NONE)
    steps = (top.t.shape[-1] + bottom.t.shape[-1]) // start.shape[-1]
    return Number(value, torch.where(lost, math.inf, error), reason, steps, 1e-8)


def cond_by_svdvals(x: Tensor, *, rtol: float, generator: torch.Generator | None) -> Number:
    """σ₁/σ_n of all singular values, with their certificate."""
    found = svd_values_twofold(x, decline=math.inf)
    first, last = found.value[:, 0], found.value[:, -1]
    value = first / last
    if x.shape[-1] == 1:
        # One singular value: the ratio is 1 whatever its error.
        value, error = torch.ones_like(first), torch.zeros_like(first)
    else:
        error = (first + found.error) / (last - found.error).clamp_min(0) - value
    exact_zero = (x == 0).all(-2).any(-1)
    reason = torch.where(exact_zero, cert.SINGULAR, found.reason)
    value = torch.where(exact_zero, math.inf, value)
    return Number(value, torch.where(error.isfinite(), error, math.inf), reason)


COND: dict[str, Callable[..., Number]] = {"lanczos": cond_by_lanczos, "svdvals": cond_by_svdvals}


@torch.no_grad()
def cond_ex(
    a: Float[Tensor, "*b m n"],
    *,
    method: str = "auto",
    rtol: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "*b"], Certificate]:
    """`cond` with its certificate, never raising for a matrix's values; inf, not converged, where a σ is zero.

    >>> value, certificate = cond_ex(torch.diag_embed(torch.tensor([[4.0, 2.0], [4.0, 0.0]])))
    >>> value.tolist(), certificate.converged.tolist()
    ([2.0, inf], [True, False])
    """
    check("cond", a)
    choose("cond", method, COND)
    batch = load(a.mT if a.shape[-2] < a.shape[-1] else a)
    tolerance = default_rtol(rtol, a.dtype)
    if not min(a.shape[-2:]):
        # No singular values: as for torch, the empty ratio is 0.
        family = {name: lambda x, **_: Number(x.new_zeros(len(x)), x.new_zeros(len(x)), _none(x)) for name in COND}
        return numbers(family, ["svdvals"], tolerance, a.dtype, batch.x, batch.finite, batch.shape, lambda v, _: v)
    names = [method]
    if method == "auto":
        names = ["svdvals"] if batch.x.shape[-1] <= SMALL else ["lanczos", "svdvals"]
    return numbers(
        COND, names, tolerance, a.dtype, batch.x, batch.finite, batch.shape, lambda v, _: v, generator=generator
    )


def _none(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], dtype=torch.long, device=x.device)


def cond(
    a: Float[Tensor, "*b m n"],
    *,
    method: str = "auto",
    rtol: float | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*b"]:
    """The condition number in the 2-norm, κ(A) = σ₁ / σ_min(m,n).

    Arguments: `a` (..., m, n); `method`, one of `COND` or "auto"; `rtol`, the relative error of κ asked for
    (`certificate.RTOL` of the dtype if None; two digits, 1e-2, are cheaper); `generator` of the random start, a fixed
    seed if None.
    Raises: `ShapeError`, `DtypeError`; `ConvergenceError` where the error bound is above rtol, as for a matrix whose
    κ is beyond what rounding lets anyone know (about rtol·1e15).
    Cost: "lanczos", one float64 LU (QR if not square) and 8·(5 to 60) products and solves with a vector; "svdvals", up
    to a side of 128 and where the other does not reach rtol, one SVD. Accuracy: uκ; the bound of "lanczos" is an
    estimate that fails with probability 1e-8.
    Source: van Dorsselaer, Hochstenbach, van der Vorst, SIAM J. Matrix Anal. Appl. 22 (2000), §3, on AᵀA and its
    inverse; Higham, Accuracy and Stability (2002), §15.1.

    >>> cond(torch.tensor([[4.0, 0.0], [0.0, 2.0]]))
    tensor(2.)
    """
    value, certificate = cond_ex(a, method=method, rtol=rtol, generator=generator)
    require_converged("cond", certificate)
    return value
