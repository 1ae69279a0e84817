"""The condition number, from the largest and the smallest singular value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg import singular_derivatives
from gramian.linalg.certificate import Certificate, default_rtol, require_converged, verdict
from gramian.linalg.engine import probes
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import Pair, eye_like, minus, pair, plus, product, transpose
from gramian.linalg.engine.escalation import Number, numbers
from gramian.linalg.engine.krylov import FAILURE, by, top_bound, top_vector
from gramian.linalg.engine.loading import check, choose, load, over, unscaled
from gramian.linalg.engine.real_form import REAL, real_form
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.inverse import inv_ex
from gramian.linalg.linear_map import LinearMap, made_dense
from gramian.linalg.norm import NARROW, SEEN, SMALL, leading, search, start_of
from gramian.linalg.singular import by_gram, svd_double_double

TINY = 128
"""Up to this smaller side the refined inverse costs less than LU and Lanczos."""

TIGHT = 64
"""Up to this side an SVD with double-double residuals costs little beside the calls."""


def _by_lanczos(x: Tensor, *, rtol: float, generator: torch.Generator | None, certify: bool = True) -> Number:
    """σ₁ by Lanczos on AᵀA, and σ_n by Lanczos on (AᵀA)⁻¹ through LU (of R, from QR, where A is not square).

    The solves round, and so do the factors: with Z ≈ A⁻ᵀW and Y = WT + FE_qᵀ ≈ A⁻¹Z, R₁ = AᵀZ − W and R₂ = AY − Z, a
    singular triple (σ, u, v) has uᵀY − σ⁻²uᵀW = σ⁻²uᵀR₁ + σ⁻¹vᵀR₂, which is `top_bound`'s uᵀD. R₁ and R₂ are
    measured from their products with random vectors.
    """
    b, m, n = x.shape
    narrow = x.dtype == torch.float32 and 0.4 * rtol >= NARROW
    top = leading(x if narrow else x.to(torch.float64), 0.4 * rtol, generator, certify)
    x = x.to(torch.float64)
    square = torch.linalg.qr(x, mode="r").R if m != n else x
    # The transpose has the column-major layout that LAPACK wants, which saves a copy.
    lu, pivots, info = torch.linalg.lu_factor_ex(square.mT)
    singular = info != 0
    if bool(singular.any()):
        lu[singular] = torch.eye(n, dtype=x.dtype, device=x.device)
    images: list[Tensor] = []

    def solve(y: Tensor, *, adjoint: bool) -> Tensor:
        # Without a batch LAPACK reads the factors in place.
        if b == 1:
            return torch.linalg.lu_solve(lu[0], pivots[0], y[0].mT, adjoint=adjoint).mT[None]
        return torch.linalg.lu_solve(lu, pivots, y.mT, adjoint=adjoint).mT

    def inverse(y: Tensor) -> Tensor:
        images.append(solve(y, adjoint=False))
        return solve(images[-1], adjoint=True)

    found, theta = search(inverse, start_of(generator, x, n, b), 1.1 * rtol)
    near = theta * (1 + 1.1 * rtol)
    p = found.t.shape[-1]
    if not certify:
        v = top_vector(found, theta)[:, None]
        y = (v @ found.t) @ found.rows + v[..., -found.block :] @ found.residual
        value = top.value * y.norm(dim=(-2, -1)) / by(y, square.mT).norm(dim=(-2, -1)).clamp_min(2.0**-900)
        lost = singular | ~value.isfinite()
        reason = torch.where(lost, cert.INACCURATE, cert.NONE)
        return Number(torch.where(singular, math.inf, value), top.error, reason, top.steps + p // found.block)
    seen = probes.probes(p, x.device, SEEN)
    weights = torch.cat([seen.omega.mT.expand(b, -1, -1), top_vector(found, theta)[:, None]], -2)
    w, z = weights @ found.rows, weights @ torch.cat(images, -2)
    y = (weights @ found.t) @ found.rows + weights[..., -found.block :] @ found.residual
    forth = by(y, square.mT)
    size = norm(square)
    first = probes.two_norm_bound((by(z, square) - w)[:, :-1], seen, gamma(n) * size * norm(z))
    second = probes.two_norm_bound((forth - z)[:, :-1], seen, gamma(n) * size * norm(y))
    share = first + second / theta.clamp_min(2.0**-900).sqrt()
    high = top_bound(found, theta, near, noise=torch.zeros_like(theta), share=share)
    # One more step of inverse iteration than the Ritz vector.
    reached = forth[:, -1].norm(dim=-1) / y[:, -1].norm(dim=-1).clamp_min(2.0**-900)
    blur = gamma(n) * size + (8 * m * U * size if m != n else 0.0)
    lowest = 1 / high.sqrt() - blur
    value = top.value / reached
    above = (top.value + top.error) / lowest - value
    below = value - top.value / (reached + blur)
    error = torch.where(lowest > 0, torch.maximum(above, below) + 8 * U * value, math.inf)
    lost = singular | ~value.isfinite() | ~error.isfinite()
    value = torch.where(singular, math.inf, value)
    reason = torch.where(lost, cert.INACCURATE, cert.NONE)
    return Number(value, torch.where(lost, math.inf, error), reason, top.steps + p // found.block, 5 * FAILURE)


def _by_gram(x: Tensor, *, rtol: float, generator: torch.Generator | None, certify: bool = True) -> Number:
    """σ₁/σ_n from the Gram matrix in float64, which resolves σ_n to a relative error of about 10nuκ²."""
    b, _, n = x.shape
    reason = torch.zeros(b, dtype=torch.long, device=x.device)
    if n == 1:
        # One singular value: the ratio is 1 whatever its error.
        one = torch.ones(b, dtype=torch.float64, device=x.device)
        value, error = one, torch.zeros_like(one)
    else:
        s, errors, ok = by_gram(x)
        value, error = _ratio(s[:, -1], errors[:, -1], torch.where(ok, s[:, 0], 0.0), errors[:, 0])
    return _of_columns(x, Number(value, error, reason))


def _by_inverse(x: Tensor, *, rtol: float, generator: torch.Generator | None, certify: bool = True) -> Number:
    """σ₁, and σ_n from the inverse, refined on double-double residuals."""
    if x.shape[-1] == 1:
        return _by_gram(x, rtol=rtol, generator=generator)
    x = x.to(torch.float64)
    value, error = _ratio(*largest(x), *smallest(x))
    if not bool(error.isfinite().all()):
        # Beyond κ of about 1e15 nothing is known: the Gram matrix's ratio is as good as any.
        s, _, _ = by_gram(x)
        value = torch.where(error.isfinite(), value, s[:, -1] / s[:, 0])
    return _of_columns(x, Number(value, error, torch.zeros_like(error, dtype=torch.long)))


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """σ₁ of each x (B, m, n) in float64, and a bound on its error: where x is small, the tighter of two."""
    s, errors, ok = by_gram(x)
    value, error = s[:, -1], torch.where(ok, errors[:, -1], math.inf)
    if x.shape[-1] <= TIGHT:
        found = svd_double_double(x, rtol=math.inf)
        tighter = (found.error < error) & (found.reason == cert.NONE)
        value, error = torch.where(tighter, found.value[:, 0], value), torch.where(tighter, found.error, error)
    return value, error


def smallest(x: Tensor) -> tuple[Tensor, Tensor]:
    """σ_n of each x (B, m, n), m ≥ n, in float64, and a bound on its error, inf where κ is beyond about 1e14.

    σ_n = 1/‖X⁻¹‖₂ with the inverse refined on double-double residuals, so that κ does not magnify its rounding. Where
    m > n, X⁻¹ is that of QᵀX, formed in double-double: the part of X that Q misses, ρ, adds ρ² to σ_n².
    """
    m, n = x.shape[-2:]
    spread, missed = x.new_zeros(x.shape[0]), x.new_zeros(x.shape[0])
    square = pair(x)
    if m > n:
        q = pair(torch.linalg.qr(x).Q)
        square = product(transpose(q), pair(x))
        defect, defect_error = minus(eye_like(x), product(transpose(q), q))
        gap, gap_error = minus(pair(x), product(q, Pair(square.hi, square.lo, square.error)))
        spread, missed = norm(defect) + defect_error, norm(gap) + gap_error
    y, _ = torch.linalg.inv_ex(square.hi)
    close = pair(y.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    for _ in range(3):
        r, _ = minus(eye_like(x), product(square, close))
        # Not a contraction: a step would make it worse, and the bound will say so.
        r = torch.where((norm(r) < 1)[:, None, None], r, 0.0)
        close = plus(close, close.hi @ r)
    r, r_error = minus(eye_like(x), product(square, close))
    # X⁻¹ = Y(I − R)⁻¹.
    size = norm(r) + r_error
    top, blur = largest(close.hi)
    blur = blur + norm(close.lo)
    value = 1 / top
    high = (1 + size) / (top - blur).clamp_min(0) / (1 - spread)
    low = (1 - size) / (top + blur) / (1 + spread)
    error = torch.maximum((high**2 + missed**2).sqrt() - value, value - low)
    return value, torch.where((size < 0.5) & (spread < 0.5), error, math.inf).nan_to_num(nan=math.inf, posinf=math.inf)


def _of_columns(x: Tensor, found: Number) -> Number:
    """inf, and singular, where a column is zero; not accurate where the error is not finite."""
    zero = (x == 0).all(-2).any(-1)
    reason = torch.where(found.error.isfinite(), found.reason, cert.INACCURATE)
    return Number(torch.where(zero, math.inf, found.value), found.error, torch.where(zero, cert.SINGULAR, reason))


def _ratio(first: Tensor, above: Tensor, last: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """σ₁/σ_n and a bound on its error from bounds on theirs."""
    value = first / last
    most = (first + above) / (last - below).clamp_min(0)
    least = (first - above).clamp_min(0) / (last + below)
    error = torch.maximum(most - value, value - least) + 3 * U * value
    return value, error.nan_to_num(nan=math.inf, posinf=math.inf)


COND: dict[str, Callable[..., Number]] = {
    "gram": _by_gram,
    "lanczos": _by_lanczos,
    "inverse": _by_inverse,
}


@differentiable(
    singular_derivatives.CONDITION,
    shapes=lambda a, **_: a.new_empty(a.shape[:-2], dtype=a.dtype.to_real()),
    methods=COND,
    real=False,
    a=2,
)
def _cond_ex(
    a: Tensor,
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Certificate]:
    """`cond_ex` in the 2-norm."""
    check("cond", a, real=False)
    if a.is_complex():
        a = real_form(a)
    choose("cond", method, COND)
    batch = unscaled(load(a.mT if a.shape[-2] < a.shape[-1] else a))
    tolerance = default_rtol(rtol, a.dtype)
    if not min(a.shape[-2:]):
        # No singular values: as for torch, the empty ratio is 0.
        family = {name: lambda x, **_: Number(x.new_zeros(len(x)), x.new_zeros(len(x)), _none(x)) for name in COND}
        return numbers(
            family, ["gram"], tolerance, a.dtype, batch.x, batch.finite, batch.shape, lambda v, _: v, certify=certify
        )
    names = [method]
    if method == "auto":
        n = batch.raw.shape[-1]
        names = ["gram"] * (n <= SMALL) + ["lanczos"] * (n > TINY) + ["inverse"]
    # Lanczos works in the dtype as given; the others need entries below 2^-126 of the largest, which float64 keeps.
    x = batch.at(None) if "lanczos" in names else batch.x
    return numbers(
        COND,
        names,
        tolerance,
        a.dtype,
        x,
        batch.finite,
        batch.shape,
        lambda v, _: v,
        certify=certify,
        generator=generator,
    )


NORMS: tuple[float | str, ...] = (1, -1, math.inf, -math.inf, "fro", "nuc")
"""The other norms. A change D of an n×n matrix changes each by at most √n ‖D‖_F, and "fro" by ‖D‖_F."""


def _by_norms(
    a: Tensor, p: float | int | str, method: str, rtol: float | None, certify: bool
) -> tuple[Tensor, Certificate]:
    """‖A‖ₚ ‖A⁻¹‖ₚ from a certified inverse; its derivative is that of the inverse and of torch's norms."""
    check("cond", a, square=True, real=False)
    if p not in NORMS:
        raise InputError(f"cond: unknown p={p!r}. Use one of: 2, -2, 1, -1, inf, -inf, 'fro', 'nuc'.")
    if method != "auto":
        raise InputError(f"cond: the methods {', '.join(COND)} are for p=2. Leave method='auto' for p={p!r}.")
    n = max(a.shape[-1], 1)
    tolerance, growth = default_rtol(rtol, a.dtype), 1.0 if p == "fro" else math.sqrt(n)
    wide, dtype = a.to(torch.promote_types(a.dtype, torch.float64)), REAL.get(a.dtype, a.dtype)
    finer = tolerance / (4 * growth * (1 if isinstance(p, str) else math.sqrt(n)))
    y, proof = inv_ex(wide, rtol=finer, certify=certify)
    # LAPACK raises for the whole batch where one matrix is not finite.
    ok = (wide.isfinite() & y.isfinite()).flatten(-2).all(-1)
    eye = torch.eye(a.shape[-1], dtype=wide.dtype, device=a.device)
    kept = [torch.where(ok[..., None, None], x, eye) for x in (wide, y)]
    sizes = [torch.linalg.matrix_norm(x, p) if x.shape[-1] else x.real.sum((-2, -1)) for x in kept]
    value = torch.where(ok, sizes[0] * sizes[1], math.nan).to(dtype)
    near = proof.error_bound / (1 - proof.error_bound).clamp_min(0)  # of ‖Y‖_F
    share = growth * near * torch.linalg.vector_norm(kept[1].detach(), dim=(-2, -1)) / sizes[1].detach()
    share = share if a.shape[-1] else torch.zeros_like(share)
    bound = torch.where(ok & (share < 0.5), share / (1 - share), math.inf) + 8 * gamma(a.shape[-1] ** 2 + 2)
    bound = bound + (0.0 if dtype == torch.float64 else torch.finfo(dtype).eps)
    reason = torch.where(proof.reason == cert.INACCURATE, cert.NONE, proof.reason)
    reason = torch.where((reason == cert.NONE) & value.detach().isinf(), cert.OVERFLOW, reason)
    value = torch.where(reason == cert.SINGULAR, math.inf, value)
    return value, verdict(
        bound.flatten(),
        tolerance,
        reason.flatten(),
        shape=a.shape[:-2],
        methods=("norms",),
        code=0,
        failure_probability=math.nan,
    )


def _in_norm(
    a: Tensor,
    p: float | int | str | None,
    method: str,
    rtol: float | None,
    certify: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, Certificate]:
    """`cond_ex` of the last two dimensions."""
    if p is None or p == 2:
        return _cond_ex(a, method=method, rtol=rtol, certify=certify, generator=generator)
    if p == -2:
        # σ_min/σ₁, with almost the relative error of its inverse.
        tolerance = default_rtol(rtol, a.dtype)
        value, proof = _cond_ex(a, method=method, rtol=tolerance * 0.9, certify=certify, generator=generator)
        if not certify:
            return 1 / value, proof
        eps = torch.finfo(a.dtype).eps
        bound = torch.where(proof.error_bound < 0.5, proof.error_bound / (1 - proof.error_bound) + eps, math.inf)
        reason = torch.where(proof.reason == cert.INACCURATE, cert.NONE, proof.reason)
        new = verdict(bound.flatten(), tolerance, reason.flatten(), methods=proof.methods, code=0, shape=bound.shape)
        return 1 / value, replace(
            new, kind=proof.kind, failure_probability=proof.failure_probability, steps=proof.steps, method=proof.method
        )
    return _by_norms(a, p, method, rtol, certify)


def cond_ex(
    a: Inexact[Tensor, ...] | LinearMap,
    p: float | int | str | None = None,
    *,
    dim: tuple[int, int] = (-2, -1),
    keepdim: bool = False,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, ...], Certificate]:
    """`cond` with its certificate, never raising for a matrix's values; inf, not converged, where a σ is zero.

    Args:
        a, p, dim, keepdim, method, rtol, certify, generator: as for `cond`; the certificate keeps no dimensions.
    Returns: the condition numbers and their `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `cond`.
    Source: as for `cond`.

    >>> value, certificate = cond_ex(torch.diag_embed(torch.tensor([[4.0, 2.0], [4.0, 0.0]])))
    >>> value.tolist(), certificate.converged.tolist()
    ([2.0, inf], [True, False])
    """

    def of(x: Any) -> tuple[Tensor, Certificate]:
        return _in_norm(made_dense("cond", x, real=False), p, method, rtol, certify, generator)

    return over("cond", a, dim, keepdim, of)


def _none(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], dtype=torch.long, device=x.device)


def cond(
    a: Inexact[Tensor, ...] | LinearMap,
    p: float | int | str | None = None,
    *,
    dim: tuple[int, int] = (-2, -1),
    keepdim: bool = False,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ...]:
    """The condition number, in the 2-norm κ(A) = σ₁ / σ_min(m,n), in another ‖A‖ₚ ‖A⁻¹‖ₚ; 1/κ(A) for p = −2.

    Args:
        a: `(..., m, n)` dense, a sparse matrix `(m, n)`, or a `LinearMap`, square where p is not ±2; the last two are
            first made dense by n products, since no few products bound the least singular value.
        dim, keepdim: the two dimensions that the matrices have, and whether they stay, with size 1; of dense tensors.
        p: the norm, as for `torch.linalg.cond`: 2, also if None, -2, 1, -1, inf, -inf, "fro" or "nuc".
        method: "gram", "lanczos", "inverse" or "auto".
        rtol: the relative error of κ asked for; `certificate.RTOL` of the dtype if None. Two digits, 1e-2, are cheaper.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
        generator: of the random start; one of a fixed seed if None.
    Returns: `(...)`, κ of each matrix, in the dtype of `a`, or of its real part.
    Raises:
        ShapeError: where `a` has fewer than two dimensions.
        DtypeError: where `a` is not floating point, real or complex.
        InputError: for an unknown p or method, or a negative rtol.
        ConvergenceError: where the error bound is above rtol, as for a κ beyond what float64 resolves (about 1e14). Of
            a singular matrix torch gives inf, NaN or a number made of rounding; `cond_ex` gives a value too, and says
            that nothing is proven of it.
    Cost: "gram", up to a side of 512, the Gram matrix's eigenvalues in float64; "lanczos", from a side of 128, one
    float64 LU (QR if not square) and 2·(10 to 40) products and 2·(10 to 40) solves with 16 vectors; "inverse", where
    those do not reach rtol, some 20 products in float64. Accuracy: uκ² for "gram", uκ for "lanczos", rtol up to κ of
    about 1e13 for "inverse"; the bound of "lanczos" is an estimate that fails with probability 5 `krylov.FAILURE`.
    Other norms: one certified inverse in float64; a bound on its error in the Frobenius norm is taken √n times, except
    for "fro".
    Source: van Dorsselaer, Hochstenbach, van der Vorst, SIAM J. Matrix Anal. Appl. 22 (2000), §3, on AᵀA and its
    inverse; Higham, Accuracy and Stability (2002), §15.1.

    >>> cond(torch.tensor([[4.0, 0.0], [0.0, 2.0]]))
    tensor(2.)
    """
    value, certificate = cond_ex(
        a, p, dim=dim, keepdim=keepdim, method=method, rtol=rtol, certify=certify, generator=generator
    )
    require_converged("cond", certificate)
    return value
