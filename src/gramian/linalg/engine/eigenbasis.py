"""Functions of matrices by their eigenvectors, bounded by the residual of the eigendecomposition.

A = W(D + O)W⁻¹ for approximate eigenvectors W, of complex pairs the real and the imaginary part, and the normal D of
their eigenvalues. So f(A) = W f(D + O) W⁻¹, and f(D + O) is f(D) and its derivative along O, of divided differences,
but for the second order of O, which the integral that defines f bounds. With Y ≈ W⁻¹ and R = I − WY,
W⁻¹ = Y(I − R)⁻¹.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg.engine import lapack
from gramian.linalg.engine.double_double import Pair, eye_like, minus, pair, product
from gramian.linalg.engine.escalation import Answer
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.similarity import spectral_bound

FINEST = 1e-13
"""The least rtol at which eigenvectors are worth a try: a rounding of the eigenvalues' functions, times κ(W)."""

ROUNDED = 6 * U
"""Relative error of a function of one complex number, with room to spare."""

CLOSE = 1e-6
"""|λᵢ − λⱼ| / |λ| below which the derivative between the two stands for the divided difference."""


class Function(NamedTuple):
    """A function f of complex numbers that is one of matrices by an integral.

    Attributes:
        of: f(λ).
        slope: f'(λ).
        change: from eigenvalues (B, n) and a bound (B,) on ‖O‖_F, one on ‖f(D + O) − f(D)‖_F; inf or NaN if none is.
        remainder: the same of f(D + O) − f(D) less the derivative along O.
        floor: what the rounding of f(λ) has beside a multiple of |f(λ)|.
    """

    of: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    change: Callable[[Tensor, Tensor], Tensor]
    remainder: Callable[[Tensor, Tensor], Tensor]
    floor: float = 0.0


class Eigenbasis(NamedTuple):
    """Eigenvalues (B, n), W, Y ≈ W⁻¹, O, bounds on ‖R‖/(1 − ‖R‖), on the error of O and on ‖O‖_F, and the residual.

    That is ‖AW − WD‖_F / (‖A‖_F ‖W‖_F).
    """

    values: Tensor
    basis: Tensor
    back: Tensor
    rest: Tensor
    share: Tensor
    unsure: Tensor
    off: Tensor
    residual: Tensor


def _partners(x: Tensor, values: Tensor) -> Tensor:
    """The columns of x (B, m, n) with those of each conjugate pair exchanged."""
    other = torch.arange(x.shape[-1], device=x.device) + values.imag.sign().long()
    return x.gather(-1, other[:, None, :].expand_as(x))


def _times(w: Tensor, f: Tensor, values: Tensor) -> Tensor:
    """WF for the real block diagonal F of f(λ), conjugate where λ is, that with the positive imaginary part first."""
    return w * f.real[:, None, :] + _partners(w, values) * f.imag[:, None, :]


def _to_plane(x: Tensor, values: Tensor) -> Tensor:
    """xV for the unitary V, of columns (1, ∓i)/√2, that makes the blocks of conjugate pairs diagonal."""
    imag = values.imag[:, None, :]
    mixed = torch.where(imag < 0, 1j, 1.0) * x + torch.where(imag < 0, 1.0, -1j) * _partners(x, values)
    return torch.where(imag == 0, x, math.sqrt(0.5) * mixed)


def _from_plane(x: Tensor, values: Tensor) -> Tensor:
    """xVᴴ."""
    imag = values.imag[:, None, :]
    mixed = torch.where(imag < 0, -1j, 1.0) * x + torch.where(imag < 0, 1j, 1.0) * _partners(x, values)
    return torch.where(imag == 0, x, math.sqrt(0.5) * mixed)


def eigenbasis(a: Pair) -> Eigenbasis:
    """The eigendecomposition of exact pairs (B, n, n), as float64 finds it; ‖O‖ is inf where there is none."""
    values, vectors, ok = lapack.eig(a.hi)
    n = values.shape[-1]
    beside = (torch.arange(n, device=values.device) + values.imag.nan_to_num().sign().long()).clamp(0, n - 1)
    ok = ok & values.isfinite().all(-1) & (values.gather(-1, beside) == values.conj()).all(-1)
    values = torch.where(ok[:, None], values, 0.0)
    w = torch.where(values.imag[:, None, :] < 0, vectors.imag, vectors.real)
    y, info = lapack.inverse(w)
    bad = ~ok | (info != 0) | ~y.isfinite().flatten(1).all(1)
    eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device).expand_as(w)
    w, y = (torch.where(bad[:, None, None], eye, z) for z in (w, y))
    gap, gap_error = minus(eye_like(y), product(pair(w), pair(y)))
    size = norm(gap) + gap_error
    share = torch.where(size < 0.5, size / (1 - size), math.inf)
    rest, error = minus(product(a, pair(w)), product(pair(w), pair(_times(eye, values, values))))
    reach, left = spectral_bound(pair(y)), norm(rest)
    unsure = reach * (error + share * (left + error) + gamma(w.shape[-1]) * math.sqrt(w.shape[-1]) * left)
    found = y @ rest
    unsure = unsure + 16 * U * norm(found)  # of its rotations
    off = torch.where(bad, math.inf, (1 + share) * reach * (left + error))
    residual = left / (norm(a.hi) * norm(w)).clamp_min(2.0**-1000)
    return Eigenbasis(values, w, y, found, share, unsure, off, residual)


def _derivative(s: Eigenbasis, f: Tensor, function: Function) -> tuple[Tensor, Tensor]:
    """The derivative of f at D along O by divided differences (Daleckii and Krein), and a bound on its error."""
    w = s.values
    gap, close = w[:, :, None] - w[:, None, :], CLOSE * w.abs()
    near = gap.abs() <= close[:, :, None].minimum(close[:, None, :])
    sizes = f.abs()[:, :, None] + f.abs()[:, None, :] + 2 * function.floor
    near = near & ((f[:, :, None] - f[:, None, :]).abs() < 0.1 * sizes)  # two signs differ at any distance
    middle = (w[:, :, None] + w[:, None, :]) / 2
    divided = (f[:, :, None] - f[:, None, :]) / torch.where(near, 1.0, gap)
    divided = torch.where(near, function.slope(middle), divided)
    # Between two near ones f' changes by the square of their distance over |λ|.
    lost = torch.where(near, 1e-6 * divided.abs(), ROUNDED * sizes / gap.abs())
    along = _to_plane(_to_plane(s.rest.to(w.dtype), w).mH, w).mH
    turned = _from_plane(_from_plane(divided * along, w).mH, w).mH.real
    return turned, norm(lost * along) + 16 * U * norm(divided * along) + function.change(w, s.unsure)


def by_eigenvectors(a: Pair, function: Function) -> tuple[Pair, Tensor, Tensor]:
    """f(A) as a pair, a bound on its Frobenius error, inf where nothing is known, and the residual."""
    s = eigenbasis(a)
    f = function.of(s.values)
    turned, lost = _derivative(s, f, function)
    usable = (lost.isfinite() & turned.isfinite().flatten(1).all(1))[:, None, None]
    inside = _times(s.basis, f, s.values) + s.basis @ torch.where(usable, turned, 0.0)
    value = product(pair(inside), pair(s.back))
    slip = ROUNDED * (norm(f) + function.floor * math.sqrt(f.shape[-1]))
    inner = function.remainder(s.values, s.off) + lost + slip
    columns = s.basis.norm(dim=-2).amax(-1)
    rounded = 6 * U * columns * norm(f) + U * norm(inside) + gamma(f.shape[-1]) * norm(s.basis) * norm(turned)
    error = (spectral_bound(pair(s.basis)) * inner + rounded) * spectral_bound(pair(s.back)) * (1 + s.share)
    error = error + s.share * (norm(value.hi) + norm(value.lo) + value.error) + value.error
    known = error.isfinite() & value.hi.isfinite().flatten(1).all(1)
    return value, torch.where(known, error * (1 + 2.0**-20), math.inf), s.residual


def settled(value: Tensor, error: Tensor, residual: Tensor, certify: bool) -> Answer:
    """The answer: what nothing is known of is left to the next method."""
    reason = torch.where(error.isfinite(), cert.NONE, cert.INACCURATE)
    return Answer(value, error, residual, reason) if certify else Answer.bare(value, reason)


class _Place(NamedTuple):
    """Of eigenvalues: the least |λ|, r, the least cos(arg(λ)/2), c, and ‖O‖/cr, inf where c is below a thousandth."""

    least: Tensor
    cosine: Tensor
    share: Tensor


def _place(values: Tensor, off: Tensor) -> _Place:
    size, p = values.abs(), values.real
    square = torch.where(p >= 0, (size + p) / (2 * size), values.imag**2 / (2 * size * (size - p))).amin(-1)
    r, c = size.amin(-1), square.sqrt()
    return _Place(r, c, torch.where(c > 1e-3, off / (c * r), math.inf))


def _integral(k: float) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """`change` and `remainder` of z^k for 0 < |k| < 1, and of log z for k = 0.

    f(A) is ∫ w(s)(A + sI)⁻¹ ds, or that less a constant, with w = |sin kπ| s^k / π, or 1 for the logarithm. As
    |λ + s| ≥ c(|λ| + s) for s ≥ 0, ‖(D + sI)⁻¹‖ ≤ 1/(c(r + s)), and that of D + O is at most 1/(1 − ‖O‖/cr) times it.
    Its first difference has two such factors, the remainder three, and ∫ w(s)(r + s)⁻² ds = |f'(r)|,
    ∫ w(s)(r + s)⁻³ ds = |f''(r)|/2. Higham, Functions of Matrices (2008), chapters 7 and 11.
    """
    first = abs(k) or 1.0
    second = first * (1 - k) / 2

    def change(values: Tensor, off: Tensor) -> Tensor:
        at = _place(values, off)
        size = (1 + 2.0**-40) * first * at.least ** (k - 1) * off / at.cosine**2 / (1 - at.share)
        return torch.where(at.share < 0.5, size, math.inf)

    def remainder(values: Tensor, off: Tensor) -> Tensor:
        at = _place(values, off)
        size = (1 + 2.0**-40) * second * at.least ** (k - 2) * off**2 / at.cosine**3 / (1 - at.share)
        return torch.where(at.share < 0.5, size, math.inf)

    return change, remainder


LOGARITHM = Function(torch.log, torch.reciprocal, *_integral(0.0), floor=1.0)
SQUARE_ROOT = Function(torch.sqrt, lambda w: 0.5 / w.sqrt(), *_integral(0.5))


def _eta(values: Tensor, off: Tensor) -> Tensor:
    """η = ‖O‖/(μ₊ + μ₋), or inf, where the eigenvalues' real parts are μ₊ or more, or −μ₋ or less, after O.

    Then D + O has a Y, ‖Y‖ ≤ 2η, for which (I + Y)⁻¹(D + O)(I + Y) commutes with sign(D), as for `sign`.
    """
    right, left = (torch.where(values.real * i > 0, values.real.abs(), math.inf).amin(-1) - off for i in (1, -1))
    least = right.minimum(left)
    eta = off / (right + left)
    known = (values.real != 0).all(-1) & (least > 0) & (4 * eta**2 < 0.5) & (4 * eta * off < least)
    return torch.where(known, eta, math.inf)


def _sign_change(values: Tensor, off: Tensor) -> Tensor:
    eta = _eta(values, off)
    return torch.where(eta < 0.4, 4 * eta / (1 - 2 * eta), math.inf)


def _sign_remainder(values: Tensor, off: Tensor) -> Tensor:
    """sign(D + O) = S(I − Y)(I + Y)⁻¹, where Y is the first order but for β(2‖O‖‖Y‖ + ‖O‖‖Y‖²), β‖O‖ ≤ η."""
    eta = _eta(values, off)
    return torch.where(eta < 0.4, 8 * eta**2 * (1 + eta + 1 / (1 - 2 * eta)), math.inf)


SIGN = Function(lambda w: w.real.sign().to(w.dtype), torch.zeros_like, _sign_change, _sign_remainder)
