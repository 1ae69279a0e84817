"""The polar factor by the SVD: the last resort, which answers wherever float64 can."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg.engine import lapack
from gramian.linalg.engine.backward_error import Rows, backward_error, tightened
from gramian.linalg.engine.double_double import (
    Pair,
    Product,
    eye_like,
    minus,
    pair,
    plus,
    product,
    rough,
    symmetric,
    transpose,
)
from gramian.linalg.engine.escalation import Answer
from gramian.linalg.engine.probes import EXACT
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.spectrum import Spectrum


def _by_svd(x: Tensor, times: Product, steps: int, certify: bool, dtype: torch.dtype = torch.float64) -> Answer:
    """U Vᵀ after `steps` Newton steps, with a bound; the isometry on the range where full rank is not proven."""
    u, s, v, ok = lapack.svd(x)
    close = pair(u @ v.mT)
    for _ in range(steps):
        close = _newton(pair(x), close, s, v)
    if not certify:
        answer = Answer.bare(close.hi, steps=steps)
    elif steps or x.shape[-1] > EXACT or not x[0:1].numel():
        answer = _bounded(x, close, s, v, times, steps)
    else:
        answer = _small(x, close.hi, s, v, times, dtype)
    # Newton steps make the value more accurate than its singular vectors.
    answer = replace(answer, spectrum=None if steps else Spectrum(s, v))
    if x.device.type == "cpu" and bool((answer.error.isfinite() & ok).all()):
        return answer
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(s.shape[0], 1)
    kept = s > 2 * U * max(x.shape[-2:]) * top
    deficient = ~answer.error.isfinite() & ~kept.all(-1)
    value = torch.where(deficient[:, None, None], (u * kept[:, None, :]) @ v.mT, answer.value)
    reason = torch.where(ok, torch.where(deficient, cert.SINGULAR, answer.reason), cert.LAPACK)
    return replace(answer, value=value, reason=reason)


def _small(x: Tensor, q: Tensor, s: Tensor, v: Tensor, times: Product, dtype: torch.dtype) -> Answer:
    """The answer for small matrices, bounded by LAPACK's backward error, the next Newton step, or its residual."""

    def finer(rows: Rows) -> tuple[Tensor, Tensor]:
        given, close, spread, right = x[rows], pair(q[rows]), s[rows], v[rows]
        error, residual = _by_next(given, close, spread, right, times)
        if not bool(error.isfinite().all()):
            own = _bounded(given, close, spread, right, times, 0)
            error, residual = torch.fmin(error, own.error), own.residual
        return error, residual

    error, residual = tightened(lambda: _by_backward_error(x, s), finer, norm(q), dtype)
    return Answer(q, error, residual, torch.where(error.isfinite(), cert.NONE, cert.INACCURATE))


def _by_backward_error(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A bound on ‖UVᵀ − polar(A)‖_F from LAPACK's own on how far A is from USVᵀ, and that, relative to ‖A‖₂.

    How far the polar factor moves is in `_bounded`.
    """
    m, n = x.shape[-2:]
    known = backward_error(max(m, n))
    far, low = known * s[:, 0], s[:, -1]
    if m == n:
        # A 1×1 has no pair.
        low = (low + s[:, -2]) / 2 if n > 1 else torch.full_like(low, math.inf)
    room = low - 2 * far
    error = math.sqrt(n) * (far / room + 2.1 * known) + gamma(n) * n
    return torch.where((room > 0) & (s[:, -1] > 2 * far), error, math.inf), torch.full_like(far, known)


def _by_next(x: Tensor, close: Pair, s: Tensor, v: Tensor, times: Product) -> tuple[Tensor, Tensor]:
    """A bound on the error from that of one more Newton step, far less, and the size of the step; and its residual.

    The bound itself takes every part of the residual for one in the direction that κ magnifies most.
    """
    further = _newton(pair(x), close, s, v)
    step, step_error = minus(further, close)
    found = _bounded(x, further, s, v, times, 1)
    return norm(step) + step_error + found.error, found.residual


def svd(x: Tensor, *, rtol: float, certify: bool = True, dtype: torch.dtype = torch.float64) -> Answer:
    """By the SVD; error uκ, bounded from residuals in plain float64; up to `EXACT` by LAPACK's own bound where that is
    a few roundings of `dtype`, else by residuals in double-double arithmetic."""
    return _by_svd(x, product if min(x.shape[-2:]) <= EXACT else rough, 0, certify, dtype)


def svd_refined(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """By the SVD and Newton steps on double-double residuals, which take the error from uκ to u for uκ < 1."""
    return _by_svd(x, product, 2, certify)


def _newton(a: Pair, q: Pair, s: Tensor, v: Tensor) -> Pair:
    """One first-order step toward the polar factor, in the basis of the right singular vectors.

    With F = QᵀQ − I and W = (I − F/2)QᵀA, the polar factor of A is, to first order in the error of Q,
    Q(I − F/2 + Ω) + (A − Q(I − F/2)W) H⁻¹, where Ω is skew and ΩH + HΩ = W − Wᵀ.
    """
    f, _ = minus(product(transpose(q), q), eye_like(q.hi))
    w = product(transpose(q), a)
    inner = f @ w.hi
    skew = (w.hi - w.hi.mT) + (w.lo - w.lo.mT) - (inner - inner.mT) / 2
    sums = s[:, :, None] + s[:, None, :]
    omega = v @ ((v.mT @ skew @ v) / torch.where(sums > 0, sums, torch.inf)) @ v.mT
    step = q.hi @ (omega - f / 2)
    if q.hi.shape[-2] > q.hi.shape[-1]:
        outside, _ = minus(a, product(q, w))
        outside = outside + q.hi @ inner
        # A rounding error inside the range of Q would be magnified by H⁻¹ and spoil QᵀQ.
        outside = outside - q.hi @ (q.hi.mT @ outside)
        step = step + outside @ (v / torch.where(s > 0, s, torch.inf)[:, None, :]) @ v.mT
    return plus(q, step)


def _bounded(x: Tensor, q: Pair, s: Tensor, v: Tensor, times: Product, steps: int) -> Answer:
    """A bound on ‖Q − polar(A)‖_F from ‖A − QH‖, QᵀQ − I, and a lower bound on H's smallest eigenvalue.

    Q' = Q(QᵀQ)^(-1/2) is the polar factor of A − E', E' = A − Q'H, for any positive definite H; and the polar factor
    moves by at most ‖E'‖_F / σ along a path on which the smallest singular value is ≥ σ (its derivative has entries
    (E_ij − E_ji)/(σ_i + σ_j), i ≠ j, in range and E_ij/σ_j out of it; Higham, Functions of Matrices, §8.1).
    """
    a, n = pair(x), x.shape[-1]
    h = symmetric(times(transpose(q), a))
    gap, gap_error = minus(a, times(q, h))
    f, f_error = minus(times(transpose(q), q), eye_like(q.hi))
    size = norm(f) + f_error
    slack = (1 - size).clamp_min(2.0**-30) ** -1.5
    turned = (norm(f @ h.hi) + (f_error + gamma(n + 2) * norm(f)) * norm(h.hi)) * slack * (1 + size) / 2
    distance = norm(gap) + gap_error + turned
    # H is positive definite if S^(-1/2) Vᵀ H V S^(-1/2) is near I, and then its eigenvalues are close to S, relatively.
    turned_h = times(times(pair(v.mT), h), pair(v))
    off, off_error = minus(turned_h, pair(torch.diag_embed(s)))
    fade = torch.where(s > 0, s, 0.0).rsqrt()
    near = norm(off * fade[:, :, None] * fade[:, None, :]) + off_error * (fade**2).amax(-1) if n else norm(off)
    skew, skew_error = minus(times(pair(v.mT), pair(v)), eye_like(v))
    shrink = (1 - near) / (1 + norm(skew) + skew_error)
    lowest = shrink * s[:, -1] if n else distance + 1
    proven = (near < 1) & (lowest > distance) & (size < 0.5)
    if x.shape[-2] == n:
        # In range only pairs count, and the smallest sum is σ_n + σ_(n−1); a 1×1 has none.
        second = s[:, -2] if n > 1 else torch.full_like(distance, math.inf)
        lowest = (lowest + shrink * second) / 2
    error = distance / (lowest - distance) + size * slack / 2 + norm(q.lo)
    error = torch.where(proven, error * (1 + 2.0**-20), math.inf)
    if not x[0:1].numel():
        error = torch.zeros_like(error)
    reason = torch.where(error.isfinite(), cert.NONE, cert.INACCURATE)
    return Answer(q.hi, error, norm(gap) / norm(x).clamp_min(2.0**-1000), reason, steps)
