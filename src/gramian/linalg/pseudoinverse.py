"""The pseudoinverse, at full and at a lower rank, with certificates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import Pair, Product, eye_like, minus, pair, plus, product, rough, transpose
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.exponential import two_norm
from gramian.linalg.engine.function import MatrixFunction, evaluate, register
from gramian.linalg.engine.loading import NEGLIGIBLE, check
from gramian.linalg.engine.probes import EXACT, FAILURE, apply, apply_transposed, closer, of_norm, probes
from gramian.linalg.engine.real_form import less_certain, nearest_complex, real_form
from gramian.linalg.engine.rounding import U, chain_rounding, gamma, norm
from gramian.linalg.engine.spectrum import Spectrum, keeping
from gramian.linalg.pseudoinverse_derivative import PSEUDOINVERSE

__all__ = ["RankedCertificate", "pinv", "pinv_ex"]


def _by_svd(
    x: Tensor, times: Product, steps: int, *, rtol: float, rank: int | None, tolerance: float, certify: bool = True
) -> Answer:
    """The pseudoinverse at the rank told, or at the number of singular values above tolerance · σ₁."""
    u, s, v, ok = lapack.svd(x)
    n = x.shape[-1]
    top = s[:, :1] if n else s.new_ones(s.shape[0], 1)
    if rank is None and tolerance > 0:
        kept = s > tolerance * top
    else:
        kept = (torch.arange(n, device=x.device) < (n if rank is None else rank)).expand_as(s)
    value, error, residual, reason, failure = _of_full_rank(x, s, v, times, steps, certify, rtol)
    full = kept.all(-1)
    inverse = torch.where(kept, 1 / torch.where(kept, s, 1.0), 0.0)
    if not certify:
        value = torch.where(full[:, None, None], value, (v * inverse[:, None, :]) @ u.mT)
        reason = torch.where(ok, torch.where(full, reason, cert.NONE), cert.LAPACK)
        value = torch.where((reason == cert.SINGULAR)[:, None, None], math.nan, value)
        return Answer.bare(value.mT, reason, steps, Spectrum(inverse, v))
    # The proof at full rank is one that every singular value is within a factor of two of that computed.
    if bool((full & (s >= 4 * tolerance * top).all(-1)).all()):
        value = torch.where((reason == cert.SINGULAR)[:, None, None], math.nan, value)
        reason = torch.where(ok, reason, cert.LAPACK)
        return Answer(value.mT, error, residual, reason, steps, failure, spectrum=Spectrum(inverse, v))
    lower, lower_error, spread = _of_lower_rank(x, u, s, v, kept, times)
    value = torch.where(full[:, None, None], value, lower)
    error = torch.where(full, error, lower_error)
    least = torch.where(kept, s, math.inf).amin(-1) if n else torch.ones_like(error)
    lost = torch.where(least > spread, cert.INACCURATE, cert.SINGULAR)
    reason = torch.where(full, reason, torch.where(error.isfinite(), cert.NONE, lost))
    if rank is None and tolerance > 0:
        # Where rounding decides on which side of the tolerance a singular value is, the rank is not known.
        doubtful = ((s - tolerance * top).abs() <= spread[:, None] * (1 + tolerance)).any(-1) & (top[:, 0] > 0)
        error = torch.where(doubtful, math.inf, error)
        reason = torch.where(doubtful, cert.INACCURATE, reason)
    reason = torch.where(ok, reason, cert.LAPACK)
    value = torch.where((reason == cert.SINGULAR)[:, None, None], math.nan, value)
    return Answer(value.mT, error, residual, reason, steps, failure, spectrum=Spectrum(inverse, v))


def _of_lower_rank(
    x: Tensor, u: Tensor, s: Tensor, v: Tensor, kept: Tensor, times: Product
) -> tuple[Tensor, Tensor, Tensor]:
    """V η(Σ) Uᵀ with η(σ) = 1/σ where σ is kept and 0 elsewhere, a bound on its error, and ε ≥ ‖A − UΣVᵀ‖_F.

    Between A and UΣVᵀ with orthonormal U and V, η changes by at most ε times its largest divided difference, which is
    1/(σᵣ(σᵣ − σᵣ₊₁)), since that is a Schur multiplier in the basis of singular vectors.
    """
    if not x[0:1].numel():
        zero = s.new_zeros(s.shape[0])
        return x.mT, zero, zero
    n = x.shape[-1]
    left, right, sigma = pair(u), pair(v), pair(torch.diag_embed(s))
    gap, gap_error = minus(pair(x), times(times(left, sigma), transpose(right)))
    spread, turned = norm(gap) + gap_error, torch.zeros_like(gap_error)
    for vectors in (left, right):
        f, f_error = minus(times(transpose(vectors), vectors), eye_like(vectors.hi))
        size = norm(f) + f_error
        # U = Q(I + F)^(1/2), and ‖(I + F)^(1/2) − I‖ ≤ ‖F‖/2 to first order.
        spread = spread + (norm(f * s[:, None, :]) + f_error * norm(s)) * 0.51 + size**2 * norm(s)
        turned = turned + 0.6 * size
    eta = torch.where(kept, 1 / torch.where(kept, s, 1.0), 0.0)
    value = (v * eta[:, None, :]) @ u.mT
    last = torch.where(kept, s, math.inf).amin(-1)
    following = torch.where(kept, 0.0, s).amax(-1)
    room = last - following - 2 * spread
    change = torch.where(room > 0, spread / ((last - spread) * room), math.inf)
    error = change + turned / last + 2 * gamma(n + 3) * eta.sum(-1)
    error = torch.where(turned < 0.1, error * (1 + 2.0**-20), math.inf)
    return value, torch.where(kept.any(-1), error, 0.0), spread


def _of_full_rank(
    x: Tensor, s: Tensor, v: Tensor, times: Product, steps: int, certify: bool, rtol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """X = B(AB)ᵀ with B = VΣ⁻¹, so many steps X ← X + BR with R = (AB)ᵀ(I − AX), and a bound from the R that is left.

    With (AB)ᵀAB = I + F, A† − X = (AᵀA)⁻¹Aᵀ(I − AX) = B(I + F)⁻¹R, so that its norm is at most
    ‖BR‖ + ‖B‖₂‖F‖‖R‖/(1 − ‖F‖). V need not be orthogonal, and κ enters once. Without steps the norms are those by
    probes, where these suffice for `rtol`. Also returned: the reason, and the probability that the bound fails.
    """
    n = x.shape[-1]
    a = pair(x)
    top = s[:, :1] if n else s.new_ones(s.shape[0], 1)
    zero = (s <= U * top * 2.0**-4).any(-1)
    safe = torch.where(zero[:, None], top.clamp_min(2.0**-1000), s)
    b = v / safe[:, None, :]
    w = times(a, pair(b))
    close = pair(b @ w.hi.mT)
    # W stands for AB up to its error, which meets I − AX = (I − AA†) + W(I + F)⁻¹R, below 2.
    left = transpose(Pair(w.hi, w.lo, torch.zeros_like(w.error)))
    square = times(left, a) if steps or not x[0:1].numel() else None
    for _ in range(steps):
        assert square is not None
        inner, _ = minus(left, times(square, close))
        close = plus(close, b @ inner)
    if not certify:
        unknown = torch.full_like(top[:, 0], math.inf)
        # The SVD's own error: whether it finds 0 or 0.1 of a rounding depends on the processor.
        lost = zero | (s <= 2 * U * top).any(-1)
        return close.hi, unknown, unknown, torch.where(lost, cert.SINGULAR, cert.NONE), math.nan
    if not steps and n > EXACT and math.isfinite(rtol) and x.numel():
        error, residual = _full_rank_bound(x, b, w, close.hi, 1.1 / safe.amin(-1))
        error = torch.where(zero, math.inf, error)
        if bool((error <= 0.9 * rtol * norm(close.hi)).all()):
            return close.hi, error, residual, torch.full_like(zero, cert.NONE, dtype=torch.long), 5 * FAILURE
    square = times(left, a) if square is None else square
    f, f_error = minus(times(transpose(w), w), eye_like(x))
    size = norm(f) + f_error
    inner, inner_error = minus(left, times(square, Pair(close.hi, close.lo, torch.zeros_like(w.error))))
    inner_error = inner_error + 2 * w.error
    step = b @ inner
    length = norm(b)
    blur = inner_error + gamma(n + 2) * norm(inner)
    reach = length.minimum(two_norm(b / length[:, None, None]) * length) if n else length
    rest = reach * (norm(inner) + inner_error) * size / (1 - size) + reach * blur
    value = plus(close, step if steps else torch.zeros_like(step))
    unused = 0.0 if steps else norm(step)
    far = unused + rest
    proven = (size < 0.5) & ~zero & (norm(inner) + inner_error < 0.3)
    error = torch.where(proven, (far + norm(value.lo)) * (1 + 2.0**-20), math.inf)
    if not x[0:1].numel():
        error, zero = torch.zeros_like(error), torch.zeros_like(zero)
    reason = torch.where(proven, cert.NONE, torch.where(zero | (times is product), cert.SINGULAR, cert.INACCURATE))
    if not x[0:1].numel():
        reason = torch.zeros_like(reason)
    return value.hi, error, norm(inner), reason, 0.0


def _full_rank_bound(x: Tensor, b: Tensor, w: Pair, value: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """The bound of `_of_full_rank` and ‖R‖_F by probes, for W ≈ AB up to its error and ‖B‖₂ ≤ `reach`; inf if none.

    LAPACK's vectors V are orthonormal to far better than 1.1.
    """
    m, n = x.shape[-2:]
    inner, outer = probes(n, x.device), probes(m, x.device)
    size, length = norm(w.hi), norm(outer.omega[None])
    omega = inner.omega.expand(len(x), -1, -1)
    z = apply(w.hi, omega)
    blur = chain_rounding(m, size, norm(z)) + size * chain_rounding(n, size, norm(inner.omega[None]))
    # ‖AB‖₂² ≤ 1 + f < 3/2 from here on.
    f = of_norm(apply_transposed(w.hi, z) - omega, inner, blur) + 3 * w.error
    omega = outer.omega.expand(len(x), -1, -1)
    y = apply(value, omega)
    gap = omega - apply(x, y)
    away = norm(x) * (gamma(n) * norm(y) + chain_rounding(m, norm(value), length)) + 2 * U * norm(gap)
    r = apply_transposed(w.hi, gap)
    blur = (w.error + gamma(m) * size) * 1.01 * norm(gap) + 1.3 * away
    whole = of_norm(r, outer, blur)
    first = closer(apply(b, r), outer, reach * blur + chain_rounding(n, norm(b), norm(r)))
    error = (first + reach * whole * f / (1 - f)) * (1 + 2.0**-20)
    proven = (f < 0.5) & (w.error < 0.1) & (whole < 0.3) & error.isfinite()
    return torch.where(proven, error, math.inf), whole


def _svd(x: Tensor, *, rtol: float, rank: int | None, tolerance: float, certify: bool = True) -> Answer:
    return _by_svd(x, rough, 0, rtol=rtol, rank=rank, tolerance=tolerance, certify=certify)


def _svd_refined(x: Tensor, *, rtol: float, rank: int | None, tolerance: float, certify: bool = True) -> Answer:
    return _by_svd(x, product, 2, rtol=rtol, rank=rank, tolerance=tolerance, certify=certify)


def _exact(mp: Any, m: Any, tolerance: float) -> Any:
    with mp.workdps(120):
        wide = m.rows < m.cols
        a = m.T if wide else m
        if tolerance:
            u, s, v = mp.svd_r(a)
            inverse = [1 / x if x > tolerance * max(s) else mp.mpf(0) for x in s]
            y = v.T * mp.diag(inverse) * u.T
            return y.T if wide else y
        try:
            y = (a.T * a) ** -1 * a.T
        except (ZeroDivisionError, TypeError):  # as in `exact_inverse`
            return None
        if not mp.norm(a) * mp.norm(y) < mp.mpf(10) ** 40:
            return None
        return y.T if wide else y


PINV = register(
    MatrixFunction(
        "pinv",
        {
            "svd": Method(
                _svd,
                torch.float64,
                2e-6,
                lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 2 * m / n, "thin64": 6 * m / n},
                "κ ≤ 1e4 at full rank, 1e8 at a lower one",
                spectral=True,
            ),
            "svd_refined": Method(
                _svd_refined,
                torch.float64,
                0.0,
                lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 36 * m / n},
                "κ to 1e14 at full rank, refined with double-double residuals",
                spectral=True,
            ),
        },
        "general",
        -1,
        plain=lambda a, tolerance: torch.linalg.pinv(a, rtol=tolerance),
        exact=_exact,
        examples={"pinv": lambda a: {"tolerance": 0.0}, "pinv_lower_rank": lambda a: {"tolerance": 1e-5}},
    )
)
"""Its methods answer with A†ᵀ, of the shape of A, since `evaluate` transposes what is wide back and forth."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RankedCertificate(Certificate):
    """A `Certificate` that says at which rank the answer was computed.

    Attributes:
        converged: as in `Certificate`.
        residual: as in `Certificate`.
        error_bound: as in `Certificate`.
        kind: as in `Certificate`.
        failure_probability: as in `Certificate`.
        steps: as in `Certificate`.
        method: as in `Certificate`.
        reason: as in `Certificate`.
        methods: as in `Certificate`.
        rank: `(...)`, the number of singular values that count as not zero.

    >>> value, certificate = pinv_ex(torch.ones(3, 2))
    >>> certificate.rank.item(), certificate.converged.item()
    (1, True)
    """

    rank: Int[Tensor, "*b"]

    def reshape(self, shape: Sequence[int]) -> RankedCertificate:
        """The same for a batch of another shape."""
        tensors = super().reshape(shape).tensors()
        return RankedCertificate(*tensors, methods=self.methods, rank=self.rank.reshape(tuple(shape)))


@differentiable(
    PSEUDOINVERSE,
    shapes=lambda a, **_: (
        a.new_empty(*a.shape[:-2], a.shape[-1], a.shape[-2]),
        a.new_empty(a.shape[:-2], dtype=torch.long),
    ),
    methods=PINV.methods,
    a=2,
)
def _pinv_ex(
    a: Tensor, *, rank: int | None, tolerance: float, method: str, rtol: float | None, certify: bool = True
) -> tuple[tuple[Tensor, Tensor], Certificate]:
    """The pseudoinverse and the rank."""
    with keeping() as kept:
        value, proof = evaluate(PINV, a, method=method, rtol=rtol, certify=certify, rank=rank, tolerance=tolerance)
    return (value.mT, (kept[-1].values > 0).sum(-1)), proof


def pinv_ex(
    a: Inexact[Tensor, "*b m n"],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> tuple[Inexact[Tensor, "*b n m"], RankedCertificate]:
    """`pinv` with its certificate, which says the rank, never raising for a matrix's values.

    Args:
        a, rank, tolerance, method, rtol, certify: as for `pinv`.
    Returns: the pseudoinverse and its `RankedCertificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `pinv`.
    Source: as for `pinv`.

    >>> value, certificate = pinv_ex(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    >>> value.tolist(), certificate.rank.item(), certificate.converged.item()
    ([[0.5, 0.0], [0.0, 0.0]], 1, True)
    """
    check("pinv", a, real=False)
    return pinv_at("pinv", a, rank, tolerance, method, rtol, certify)


def default_tolerance(a: Tensor) -> float:
    """What counts as zero beside σ₁: rounding of its dtype, and more than the SVD in float64 rounds itself."""
    return max(a.shape[-2:]) * max(torch.finfo(a.dtype).eps, NEGLIGIBLE * 2 * U)


def pinv_at(
    name: str, a: Tensor, rank: int | None, tolerance: float | None, method: str, rtol: float | None, certify: bool
) -> tuple[Tensor, RankedCertificate]:
    """The pseudoinverse of real and complex matrices."""
    least = min(a.shape[-2:])
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= least):
        raise InputError(
            f"{name}: expected a rank from 0 to {least}, got {rank!r}. Leave it out to count the singular values above "
            "the tolerance."
        )
    if tolerance is None:
        tolerance = default_tolerance(a)
    elif not 0 <= tolerance < 1:
        raise InputError(f"{name}: expected a tolerance ≥ 0 and below 1, relative to σ₁, got {tolerance}.")
    if not a.is_complex():
        (value, found), proof = _pinv_ex(a, rank=rank, tolerance=tolerance, method=method, rtol=rtol, certify=certify)
        return value, RankedCertificate(*proof.tensors(), methods=proof.methods, rank=found)
    twice = None if rank is None else 2 * rank
    (value, found), proof = _pinv_ex(
        real_form(a), rank=twice, tolerance=tolerance, method=method, rtol=rtol, certify=certify
    )
    value, rounding = nearest_complex(value)
    proof = less_certain(proof, rounding, default_rtol(rtol, a.dtype))
    return value, RankedCertificate(*proof.tensors(), methods=proof.methods, rank=found // 2)


def pinv(
    a: Inexact[Tensor, "*b m n"],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> Inexact[Tensor, "*b n m"]:
    """The pseudoinverse of a matrix, or of the nearest one of a lower rank.

    A† = V Σᵣ⁻¹ Uᵀ for A = UΣVᵀ, with the r singular values that count; (AᵀA)⁻¹Aᵀ at full rank.

    A† jumps where the rank changes. So r is fixed first: it is `rank`, or the number of singular values above
    `tolerance` · σ₁. The certificate is for that r, which `pinv_ex` returns with it. Where rounding leaves it open
    whether a singular value is above the tolerance, or there is no gap below σᵣ, the matrix fails its certificate.

    Args:
        a: `(..., m, n)`.
        rank: r, for all matrices.
        tolerance: what counts as zero, relative to σ₁; max(m, n)·ε(dtype) if None, as for torch, ten times that in
            float64. With 0 a matrix whose rank is not full is refused.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., n, m)`, the pseudoinverse, in the dtype of `a`.
    Raises:
        ShapeError: where `a` has fewer than two dimensions.
        DtypeError: where `a` is not floating point, real or complex.
        InputError: for a rank above min(m, n), an unknown method, or a negative tolerance or rtol.
        ConvergenceError: where the rank is not certain, or the error bound is above rtol.
    Cost: an SVD in float64 and 2 products, 8 at a lower rank, 36 refined. Accuracy: what `rtol` asks for, until κ
    nears 1e14; at a lower rank u σ₁/(σᵣ − σᵣ₊₁). The certificate's residual is ‖(AVΣ⁻¹)ᵀ(I − AX)‖_F, of full rank.
    Source: Björck, Numerical Methods for Least Squares Problems (1996), §1.2.5 and §2.9.

    >>> pinv(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    tensor([[1.0000, 0.0000, 0.0000],
            [0.0000, 0.5000, 0.0000]])
    """
    value, certificate = pinv_ex(a, rank=rank, tolerance=tolerance, method=method, rtol=rtol, certify=certify)
    require_converged("pinv", certificate)
    return value
