"""Inverse p-th roots and square roots of symmetric positive semi-definite matrices, with certificates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg.batch import Answer, Batch, Route, check, choose, climb, declined, ladder, load, norm, scale
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.conditioning import eigenvalue_ratio
from gramian.linalg.inverse_root import NEGLIGIBLE, coupled_newton, decompose, eigh32, eigh64
from gramian.linalg.inverses import Damping, damped, damping_of
from gramian.linalg.probes import apply, chain_rounding, of_norm, probes
from gramian.linalg.symmetric import symmetric_product
from gramian.linalg.twofold import Pair, eye_like, gamma, minus, pair, plus, product, rough, symmetric

Product = Callable[[Pair, Pair], Pair]

SQRT_LOSS = 1.2e-5
"""Bound on the relative error over √κ, that a float32 eigendecomposition costs the square root; observed."""


def _power(x: Pair, p: int, times: Product) -> Pair:
    """x^p by repeated squaring."""
    if p == 1:
        return x
    half = _power(x, p // 2, times)
    square = times(half, half)
    return times(square, x) if p % 2 else square


def _inv_root(x: Tensor, shift: Tensor, asymmetric: Tensor, p: int, eps: float, times: Product, steps: int) -> Answer:
    """V w^(-1/p) Vᵀ, then `steps` first-order corrections from R = I − XᵖM, and the bound that follows from R.

    In the eigenbasis the correction is R_ij x_jᵖ / Σ_k x_iᵏ x_j^(p−1−k), the divided difference of λ^(-1/p) without its
    cancellation (Higham, Functions of Matrices, theorem 3.11). If X is positive definite and ‖R‖ = r < 1, then
    (1 − r) X⁻ᵖ ≤ M ≤ (1 + r) X⁻ᵖ, and as λ^(-1/p) is operator monotone, ‖M^(-1/p) − X‖ ≤ ((1 − r)^(-1/p) − 1) ‖X‖ in
    every unitarily invariant norm: no condition number enters.
    """
    m = damped(x, shift)
    w, v, floor, reason = decompose(m, asymmetric, eps)
    root = torch.where(w > 0, w, torch.inf) ** (-1 / p)
    value = symmetric(pair((v * root[:, None, :]) @ v.mT))
    value = pair(value.hi)
    row, column = root[:, :, None], root[:, None, :]
    ratio = torch.where(row > 0, column / row, 0.0)
    # Divided by x_iᵖ⁻¹ throughout, so that no power overflows.
    weights = row * ratio**p / sum(ratio ** (p - 1 - k) for k in range(p))
    for _ in range(steps):
        r, _ = minus(eye_like(x), times(_power(value, p, times), m))
        # Eigenvalues ascend: above the diagonal lie the large entries of R, below it their rounding.
        d = ((v.mT @ r @ v) * weights).triu()
        d = v @ (d + d.triu(1).mT) @ v.mT
        value = plus(value, (d + d.mT) / 2)
    r, r_error = minus(eye_like(x), times(_power(value, p, times), m))
    size = norm(r) + r_error
    n = x.shape[-1]
    largest = root.amax(-1) if n else root.new_zeros(root.shape[0])
    smallest = root.amin(-1) if n else root.new_ones(root.shape[0])
    positive = smallest / 2 > 8 * gamma(n + 8) * math.sqrt(max(n, 1)) * largest
    proven = (size < 1) & positive & (w > 0).all(-1)
    relative = torch.expm1(torch.log1p(-size.clamp_max(0.999)) / -p)
    error = torch.where(proven, relative * (norm(value.hi) + norm(value.lo)) + norm(value.lo), math.inf)
    kept = w > floor
    unproven = torch.where(kept.all(-1), cert.INACCURATE, cert.SINGULAR)
    reason = torch.where((reason == cert.NONE) & ~proven, unproven, reason)
    on_range = (v * (root * kept)[:, None, :]) @ v.mT
    return Answer(torch.where(proven[:, None, None], value.hi, on_range), error, norm(r), reason, steps)


def inv_root_eigh_refined(
    x: Tensor, shift: Tensor, asymmetric: Tensor, p: int, eps: float, *, decline: float
) -> Answer:
    """The same with first-order corrections from twofold residuals: right to the last bits while uκ < 1."""
    return _inv_root(x, shift, asymmetric, p, eps, product, steps=2)


INV_ROOT: dict[str, Route] = {
    "coupled_newton": Route(
        coupled_newton, torch.float64, 1e-4, lambda m, n: {"float32": 92, "thin64": 18}, narrow=True
    ),
    "eigh32": Route(
        eigh32,
        torch.float64,
        1e-5,
        lambda m, n: {"eigh32": 1, "cholesky32": 2, "float32": 0.8, "thin64": 10},
        narrow=True,
    ),
    "eigh64": Route(eigh64, torch.float64, 1e-12, lambda m, n: {"eigh64": 1, "float32": 0.8, "thin64": 14}),
    "eigh_refined": Route(inv_root_eigh_refined, torch.float64, 0.0, lambda m, n: {"eigh64": 1, "float64": 40}),
}


def _sqrtm(x: Tensor, shift: Tensor, asymmetric: Tensor, eps: float, times: Product, steps: int) -> Answer:
    """V w^(1/2) Vᵀ, then `steps` corrections E_ij / (s_i + s_j) from E = M − X², and a bound column by column.

    With D = √M − X, √M D + D X = E, so for an eigenvector X v = s v: ‖D v‖ ≤ ‖E v‖ / s, while ‖D‖₂ ≤ √‖E‖₂ covers the
    directions with s near zero (Bhatia, Matrix Analysis, theorem X.1.1). What is negative in M counts as zero: its
    size ν enters where the eigenvalue is not certain to be positive.
    """
    m = damped(x, shift)
    w, v, _, reason = decompose(m, asymmetric, eps)
    s = w.clamp_min(0).sqrt()
    value = pair(symmetric(pair((v * s[:, None, :]) @ v.mT)).hi)
    sums = s[:, :, None] + s[:, None, :]
    for _ in range(steps):
        e, _ = minus(m, times(value, value))
        d = v @ ((v.mT @ e @ v) / torch.where(sums > 0, sums, torch.inf)) @ v.mT
        value = plus(value, (d + d.mT) / 2)
    e, e_error = minus(m, times(value, value))
    vectors, diagonal = pair(v), pair(torch.diag_embed(w))
    # How far V w Vᵀ is from M, and V w₊ Vᵀ from X²; M₊ is at most as far from (V w Vᵀ)₊ as M from V w Vᵀ.
    whole, whole_error = minus(m, times(times(vectors, diagonal), pair(v.mT)))
    clipped = times(times(vectors, pair(diagonal.hi.clamp_min(0))), pair(v.mT))
    kept, kept_error = minus(clipped, times(value, value))
    f, f_error = minus(times(pair(v.mT), vectors), eye_like(v))
    skew = 2.1 * (norm(f * w[:, None, :]) + f_error * norm(w))
    apart = norm(whole) + whole_error + skew
    total = apart + norm(kept) + kept_error
    lowest = w.amin(-1) if w.shape[-1] else apart
    total = torch.where(lowest > apart, total.minimum(norm(e) + e_error), total)
    wide = total.sqrt()[:, None]
    negative = torch.where(lowest > apart, 0.0, (-lowest).clamp_min(0) + apart)[:, None]
    # Column by column, where s is not small.
    miss, miss_error = minus(times(m, vectors), times(vectors, diagonal))
    drift, drift_error = minus(times(value, vectors), times(vectors, pair(torch.diag_embed(s))))
    share = ((miss.norm(dim=1) + miss_error[:, None]) / w).clamp(0, 1)
    share = torch.where(w > 0, share, 1.0)
    columns = (e @ v).norm(dim=1) + (e_error + gamma(x.shape[-1]) * norm(e))[:, None] + negative * share
    columns = (columns + wide * (drift.norm(dim=1) + drift_error[:, None])) / s
    columns = torch.where(s > 0, columns, math.inf).minimum(wide)
    error = columns.norm(dim=-1) * (1 + norm(f) + f_error) + norm(value.lo)
    return Answer(value.hi, error, norm(e) / norm(m.hi).clamp_min(2.0**-1000), reason, steps)


def _sqrtm_probed(x: Tensor, shift: Tensor, asymmetric: Tensor, eps: float, work: torch.dtype) -> Answer:
    """V w₊^(1/2) Vᵀ, with the bound of the difference of two roots from that of their squares.

    Positive parts are no farther apart than the matrices: e bounds ‖M₊ − X²‖_F if ‖M − V w Vᵀ‖_F and ‖VᵀV − I‖_F do.
    Then ‖√M₊ − X‖_F ≤ (√n e)^(1/2) (Powers–Størmer; Bhatia, Matrix Analysis, theorem X.1.3), and ≤ e / (2√λ) where
    both are above λ > 0.
    """
    n = x.shape[-1]
    m = damped(x, shift)
    w, v, _, reason = decompose(m._replace(hi=m.hi.to(work)), asymmetric, eps)
    w = w.double()
    s = w.clamp_min(0).sqrt()
    dtype = torch.float64 if eps < 2.0**-30 else torch.float32
    left = v.to(dtype) * s.sqrt().to(dtype)[:, None, :]
    value = symmetric_product(left, left.mT)
    if not value[0:1].numel():
        zero = torch.zeros_like(shift)
        return Answer(value, zero, zero, reason)
    p = probes(n, x.device)
    omega = p.omega.expand(x.shape[0], -1, -1)
    vectors, length, wide = v.double(), norm(omega), w.abs().amax(-1)
    across = vectors.mT @ omega
    slip = 3 * chain_rounding(n + 3, math.sqrt(n), length)
    phi = of_norm(vectors.mT @ (vectors @ omega) - omega, p, slip)
    image = rough(m, pair(omega))
    miss = of_norm(image.hi - vectors @ (w[:, :, None] * across), p, image.error + slip * wide + norm(m.lo))
    apart = of_norm(apply(value, omega) - vectors @ (s[:, :, None] * across), p, slip * (wide.sqrt() + norm(value)))
    # (V w Vᵀ)₊ and X² are V w₊ Vᵀ but for the defect of V.
    e = miss + 4 * phi * wide
    lowest = (w[:, 0] * (1 - 2 * phi) - e).clamp_min(0)
    error = torch.minimum((math.sqrt(n) * e).sqrt(), e / (2 * lowest.sqrt())) + apart
    usable = (phi < 0.1) & error.isfinite()
    # float32 cannot tell indefinite from rounding as finely as was promised: float64 decides.
    final = (
        torch.where(usable, reason, cert.INACCURATE)
        if work == torch.float64
        else torch.where(
            usable & (reason == cert.NONE), cert.NONE, torch.where(asymmetric, cert.NOT_SYMMETRIC, cert.INACCURATE)
        )
    )
    error = torch.where(usable, error, math.inf)
    return Answer(value, error, miss / norm(m.hi).clamp_min(2.0**-1000), final, failure=3 * p.failure)


def sqrtm_eigh32(x: Tensor, shift: Tensor, asymmetric: Tensor, eps: float, *, decline: float) -> Answer:
    """By an eigendecomposition in float32, bounded by probes."""
    if math.isfinite(decline) and x.numel():
        narrow = damped(x, shift).hi.float()
        hopeless = decline * eigenvalue_ratio(narrow).sqrt() < SQRT_LOSS
        if bool(hopeless.all()):
            return declined(narrow)
    return _sqrtm_probed(x, shift, asymmetric, eps, torch.float32)


def sqrtm_eigh64(x: Tensor, shift: Tensor, asymmetric: Tensor, eps: float, *, decline: float) -> Answer:
    """By an eigendecomposition in float64, bounded by probes: 1e-7 at worst, as a root turns ε into √ε."""
    return _sqrtm_probed(x, shift, asymmetric, eps, torch.float64)


def sqrtm_eigh(x: Tensor, shift: Tensor, asymmetric: Tensor, eps: float, *, decline: float) -> Answer:
    """By an eigendecomposition, bounded from a residual in plain float64."""
    return _sqrtm(x, shift, asymmetric, eps, rough, steps=0)


def sqrtm_eigh_refined(x: Tensor, shift: Tensor, asymmetric: Tensor, eps: float, *, decline: float) -> Answer:
    """The same with a first-order correction from a twofold residual."""
    return _sqrtm(x, shift, asymmetric, eps, product, steps=1)


SQRTM: dict[str, Route] = {
    "eigh32": Route(
        sqrtm_eigh32,
        torch.float64,
        1e-5,
        lambda m, n: {"eigh32": 1, "cholesky32": 2, "float32": 0.8, "thin64": 9},
        narrow=True,
    ),
    "eigh64": Route(sqrtm_eigh64, torch.float64, 1e-5, lambda m, n: {"eigh64": 1, "float32": 0.8, "thin64": 9}),
    "eigh": Route(sqrtm_eigh, torch.float64, 1e-13, lambda m, n: {"eigh64": 1, "float64": 11}),
    "eigh_refined": Route(sqrtm_eigh_refined, torch.float64, 0.0, lambda m, n: {"eigh64": 1, "float64": 40}),
}


def _symmetric_batch(name: str, m: Tensor, damping: Damping, multiple: int) -> tuple[Batch, Tensor, Tensor]:
    """The batch with symmetric parts taken, the damping scaled alike, and which matrices were not symmetric."""
    shift = damping_of(name, damping, m)
    batch = load(m, multiple=multiple, at_least=shift)
    if m.device.type == "cpu" and torch.equal(m, m.mT):
        return batch, scale(shift, -batch.exponent), torch.zeros_like(batch.finite)
    x = batch.x
    allowed = NEGLIGIBLE * m.shape[-1] * torch.finfo(m.dtype).eps * norm(x)
    asymmetric = norm(x - x.mT) > allowed
    # Halved before the sum, which is then exact but for its last bit.
    even = replace(batch, raw=x / 2 + x.mT / 2, down=torch.zeros_like(batch.down))
    return even, scale(shift, -batch.exponent), asymmetric


@torch.no_grad()
def inv_root_ex(
    m: Float[Tensor, "*b n n"], p: int, damping: Damping = 0.0, *, method: str = "auto", rtol: float | None = None
) -> tuple[Float[Tensor, "*b n n"], Certificate]:
    """`inv_root` with its certificate, never raising for a matrix's values.

    Where M + λI is rank-deficient the value is the root of the inverse on its range, and not converged.

    >>> value, certificate = inv_root_ex(torch.diag(torch.tensor([16.0, 0.0])), 4)
    >>> value.tolist(), certificate.converged.item()
    ([[0.5, 0.0], [0.0, 0.0]], False)
    """
    check("inv_root", m, square=True)
    choose("inv_root", method, INV_ROOT)
    if isinstance(p, bool) or not isinstance(p, int) or p < 1:
        raise InputError(f"inv_root: expected an integer p ≥ 1, got {p!r}. Use p=2 or p=4, for M^(-1/2) or M^(-1/4).")
    batch, shift, asymmetric = _symmetric_batch("inv_root", m, damping, p)
    tolerance = default_rtol(rtol, m.dtype)
    names = [method] if method != "auto" else ladder(INV_ROOT, m.shape, tolerance, m.device.type)
    return climb(
        batch,
        INV_ROOT,
        names,
        tolerance,
        lambda e: -e // p,
        shift=shift,
        asymmetric=asymmetric,
        p=p,
        eps=torch.finfo(m.dtype).eps,
    )


def inv_root(
    m: Float[Tensor, "*b n n"], p: int, damping: Damping = 0.0, *, method: str = "auto", rtol: float | None = None
) -> Float[Tensor, "*b n n"]:
    """The inverse p-th root of a symmetric positive definite matrix.

    inv_root(M, p, λ) = (M + λI)^(-1/p).

    Arguments: `m` (..., n, n), symmetric up to 10·n·ε(dtype); `p`, an integer ≥ 1; `damping` λ ≥ 0, absolute, one
    number or one per matrix; `method`, one of `INV_ROOT` or "auto"; `rtol`, the relative Frobenius error asked for
    (`certificate.RTOL` of the dtype if None).
    Raises: `ShapeError`, `DtypeError`; `ConvergenceError` where M + λI is not symmetric, has an eigenvalue that is not
    positive, or the error bound is above rtol.
    Cost in float32 products at 1024²: an eigendecomposition, 7 in float32 or 13 in float64, and about 3; refined, 100.
    "coupled_newton" about 90, products only. Accuracy: what `rtol` asks for, until κ nears 1e13; the residual is a
    bound on ‖XᵇMXᵃ − I‖_F, a + b = p.
    Source: Higham, Functions of Matrices (2008), chapter 7 and theorem 3.11.

    >>> inv_root(torch.diag(torch.tensor([16.0, 1.0])), 4)
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    value, certificate = inv_root_ex(m, p, damping, method=method, rtol=rtol)
    require_converged("inv_root", certificate)
    return value


@torch.no_grad()
def sqrtm_ex(
    m: Float[Tensor, "*b n n"], damping: Damping = 0.0, *, method: str = "auto", rtol: float | None = None
) -> tuple[Float[Tensor, "*b n n"], Certificate]:
    """`sqrtm` with its certificate, never raising for a matrix's values; the root of the positive part if indefinite.

    >>> value, certificate = sqrtm_ex(torch.diag(torch.tensor([4.0, -1.0])))
    >>> value.diagonal().tolist(), certificate.converged.item()
    ([2.0, 0.0], False)
    """
    check("sqrtm", m, square=True)
    choose("sqrtm", method, SQRTM)
    batch, shift, asymmetric = _symmetric_batch("sqrtm", m, damping, 2)
    tolerance = default_rtol(rtol, m.dtype)
    names = [method] if method != "auto" else ladder(SQRTM, m.shape, tolerance, m.device.type)
    return climb(
        batch,
        SQRTM,
        names,
        tolerance,
        lambda e: e // 2,
        shift=shift,
        asymmetric=asymmetric,
        eps=torch.finfo(m.dtype).eps,
    )


def sqrtm(
    m: Float[Tensor, "*b n n"], damping: Damping = 0.0, *, method: str = "auto", rtol: float | None = None
) -> Float[Tensor, "*b n n"]:
    """The square root of a symmetric positive semi-definite matrix.

    sqrtm(M, λ) = (M + λI)^(1/2), symmetric positive semi-definite.

    Arguments: `m` (..., n, n), symmetric up to 10·n·ε(dtype); `damping` λ ≥ 0, absolute, one number or one per matrix;
    `method`, one of `SQRTM` or "auto"; `rtol`, the relative Frobenius error asked for (`certificate.RTOL` if None).
    Eigenvalues between −10·n·ε(dtype)·‖M‖ and 0 count as zero.
    Raises: `ShapeError`, `DtypeError`; `ConvergenceError` where M + λI is not symmetric, has a negative eigenvalue
    beyond rounding, or the error bound is above rtol.
    Cost in float32 products at 1024²: an eigendecomposition, 7 in float32 or 13 in float64, and about 3; with the
    finer bound of "eigh" 25 more. Accuracy: what `rtol` asks for; 1e-7 where M is singular, as a root turns ε into √ε.
    The residual is ‖M − V w Vᵀ‖_F / ‖M‖_F, or ‖M − X²‖_F / ‖M‖_F by "eigh" and "eigh_refined".
    Source: Higham, Functions of Matrices (2008), chapter 6; Bhatia, Matrix Analysis (1997), theorem X.1.1.

    >>> sqrtm(torch.diag(torch.tensor([4.0, 9.0])))
    tensor([[2., 0.],
            [0., 3.]])
    """
    value, certificate = sqrtm_ex(m, damping, method=method, rtol=rtol)
    require_converged("sqrtm", certificate)
    return value
