"""The matrix sign, with certificates."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, require_converged
from gramian.linalg.engine import eigenbasis
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import Pair, eye_like, minus, pair, plus, product, symmetric
from gramian.linalg.engine.eigenbasis import FINEST, by_eigenvectors, settled
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.exponential import two_norm
from gramian.linalg.engine.function import MatrixFunction, evaluate, of_eigenvalues, register
from gramian.linalg.engine.real_form import takes_complex
from gramian.linalg.engine.rounding import U, norm
from gramian.linalg.engine.similarity import similar
from gramian.linalg.engine.stable import newton, solve, stable

__all__ = ["sign", "sign_ex"]


CORRECTIONS = 2
"""First-order corrections before the one whose remainder the bound counts."""

REFINEMENTS = 2
"""Of the eigenvectors, from float64 to double-double accuracy."""


def _involution(x: Pair) -> Pair:
    """Two steps X ← X + X(I − X²)/2 toward X² = I."""
    for _ in range(2):
        r, _ = minus(eye_like(x.hi), product(x, x))
        r = torch.where((norm(r) < 0.5)[:, None, None], r, 0.0)
        x = plus(x, x.hi @ r / 2)
    return x


def _newton(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """Scaled Newton to X, then X − 2W with NW + WN = E, N = (AX + XA)/2, E = (XAX − A)/2.

    For an X with X² = I, A + E commutes with X, and where N's eigenvalues are in the right half-plane X is its sign.
    That of A is (I + Y)X(I + Y)⁻¹ with a Y that anticommutes with X, as E does; XY = W* solves
    NW* + W*N = E − XW*EXW*, so that with β of `stable` ‖W* − W‖ ≤ β‖X‖²‖E‖‖W*‖², and
    ‖sign(A) − (X − 2W)‖ ≤ 2‖W* − W‖ + 2‖W*‖²‖X‖/(1 − ‖X‖‖W*‖). (Stewart and Sun, Matrix Perturbation Theory (1990),
    §V.2, has the equation for invariant subspaces.)
    """
    a, steps = pair(x), newton(x)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    side = torch.where(norm(steps.limit - eye) < 1e-3, 1.0, torch.where(norm(steps.limit + eye) < 1e-3, -1.0, 0.0))
    one_sided = side != 0  # and then the sign is I or −I
    close = _involution(pair(torch.where(one_sided[:, None, None], side[:, None, None] * eye, steps.limit)))
    s = stable(((x @ close.hi) + (close.hi @ x)) / 2, close.hi, bounded=certify)
    for _ in range(CORRECTIONS):
        e, _ = minus(product(product(close, a), close), a)
        w, _ = solve(s, e / 2, close.hi)
        w = torch.where((norm(w) < 0.1)[:, None, None], w, 0.0)  # else it is no improvement, and the bound says so
        close = _involution(plus(close, -2 * w))
    bad = ~steps.converged
    if not certify:
        seen = torch.where(bad, cert.NO_SIGN, torch.where(s.ok, cert.NONE, cert.INACCURATE))
        return Answer.bare(torch.where(bad[:, None, None], math.nan, close.hi), seen, len(steps.factors))
    r, r_error = minus(eye_like(x), product(close, close))
    # The nearest X with X² = I, X(I − R)^(-1/2), is this far.
    size = norm(close.hi)
    away = size * (norm(r) + r_error)
    right, left = product(a, close), product(close, a)
    e, e_error = minus(product(left, close), a)
    e, e_error = e / 2, e_error / 2 + 1.1 * norm(x) * size * away
    w, gap = solve(s, e, close.hi)
    apart = norm((right.hi - s.n) + (left.hi - s.n)) / 2 + 2.0**-52 * norm(s.n)
    slack = apart + norm(right.lo) + norm(left.lo) + right.error + left.error + 1.1 * norm(x) * away
    beta = s.beta / (1 - 2 * s.beta * slack)
    first = norm(w) + beta * (gap + e_error + 2 * slack * norm(w))
    spread = two_norm(close.hi / size[:, None, None].clamp_min(1.0)) * size.clamp_min(1.0) + away
    curve = beta * spread**2 * (norm(e) + e_error)
    most = 2 * first
    # The eigenvalues of the exact NX, and of A, are on the sides where those of N were found.
    sure = s.ok & (2 * s.whole * (slack + spread**2 * (norm(e) + e_error) * most) < 0.5)
    known = sure & steps.converged & (2 * s.beta * slack < 0.5) & (4 * curve * first < 0.5) & (spread * most < 0.5)
    wide = curve * most**2 + beta * (gap + e_error + 2 * slack * norm(w))
    value = plus(close, -2 * w)
    error = 2 * wide + 2 * most**2 * spread / (1 - spread * most) + norm(value.lo) + away
    error = torch.where(known, error * (1 + 2.0**-20), math.inf)
    error = torch.where(one_sided & sure, 0.0, error)
    if not x[0:1].numel():
        error = torch.zeros_like(error)
    reason = torch.where(bad, cert.NO_SIGN, torch.where(error.isfinite(), cert.NONE, cert.INACCURATE))
    out = torch.where(bad[:, None, None], math.nan, value.hi)
    residual = norm(e) / norm(x).clamp_min(2.0**-1000)
    return Answer(out, error, residual, reason, len(steps.factors), 3 * s.failure)


def _by_eigenvectors(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """By the signs of the eigenvalues' real parts."""
    if not x[0:1].numel():
        return _newton(x, rtol=rtol, certify=certify)
    value, error, residual = by_eigenvectors(pair(x), eigenbasis.SIGN)
    return settled(value.hi, error + norm(value.lo), residual, certify)


def _diagonalized(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """W sign(B) W⁻¹ from B = W⁻¹AW, whose sign is that of its diagonal, S, but for what B has between the two sides.

    B = D + O, where D commutes with S and O anticommutes. If xᵀDSx ≥ μ₊ or μ₋ for the unit vectors x of either side,
    β = 1/(μ₊ + μ₋) bounds the inverse of W ↦ DSW + WDS on what anticommutes. Then for η = β‖O‖, 4η² < 1, there is a Y
    with ‖Y‖ ≤ 2η for which (I + Y)⁻¹B(I + Y) = D + OY commutes with S, as for `_newton`. Where 2η‖O‖ is below μ₊ and
    μ₋ its sign is S, and ‖sign(B) − S‖ ≤ 2‖Y‖/(1 − ‖Y‖).
    """
    if not x[0:1].numel():
        return _newton(x, rtol=rtol, certify=certify)
    s = similar(pair(x), REFINEMENTS)
    b, eye = s.b, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    side = torch.where(b.hi.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    # The symmetric part of DS is P^½(I + F)P^½ for its diagonal P, and so at least (1 − ‖F‖)P.
    together = side[:, :, None] == side[:, None, :]
    even = symmetric(Pair(torch.where(together, b.hi, 0.0), torch.where(together, b.lo, 0.0), b.error))
    size = side * even.hi.diagonal(dim1=-2, dim2=-1) - even.lo.diagonal(dim1=-2, dim2=-1).abs()
    rest = torch.where(eye == 1, 0.0, even.hi.abs() + even.lo.abs() + 4 * U * (b.lo.abs() + b.lo.mT.abs()))
    root = size.clamp_min(2.0**-1000).sqrt()
    least = size.amin(-1)
    far = norm(rest / root[:, :, None] / root[:, None, :]) + b.error / least.clamp_min(2.0**-1000)
    proven = (least > 0) & (far < 0.5)
    right, left = (torch.where(side == i, size, math.inf).amin(-1) * (1 - far) * (1 - 2.0**-20) for i in (1, -1))
    one_sided = (side == side[:, :1]).all(-1)
    between = norm(torch.where(together, 0.0, b.hi)) + norm(torch.where(together, 0.0, b.lo)) + b.error
    between = torch.where(one_sided, 0.0, between * (1 + 2.0**-20))
    eta = between / (right + left)
    known = proven & (4 * eta**2 < 0.5) & (2 * eta * between < right.minimum(left) / 2)
    value, error = s.restored(pair(side[:, :, None] * eye), 4 * eta / (1 - 2 * eta))
    out = torch.where(one_sided[:, None, None], side[:, :1, None] * eye, value.hi)
    error = torch.where(one_sided, 0.0, (error + norm(value.lo)) * (1 + 2.0**-20))
    known = known & error.isfinite()
    # In a basis that resolves the eigenvalues, what is not off the axis is on it, up to rounding.
    on_axis = ~proven & (b.error < 2.0**-60 * norm(b.hi))
    reason = torch.where(known, cert.NONE, torch.where(on_axis, cert.NO_SIGN, cert.INACCURATE))
    out = torch.where(on_axis[:, None, None], math.nan, out)
    if not certify:
        return Answer.bare(out, reason)
    residual = between / norm(b.hi).clamp_min(2.0**-1000)
    return Answer(out, torch.where(known, error, math.inf), residual, reason)


def _plain(m: Tensor) -> Tensor:
    w, v = torch.linalg.eig(m)
    return ((v * w.real.sign().to(v.dtype)[..., None, :]) @ torch.linalg.inv(v)).real


def _exact(mp: Any, m: Any) -> Any:
    tiny = mp.mpf(10) ** -45 * mp.norm(m)
    return of_eigenvalues(mp, m, lambda w: None if abs(mp.re(w)) <= tiny else mp.sign(mp.re(w)))


SIGN = register(
    MatrixFunction(
        "sign",
        {
            "eigenvectors": Method(
                _by_eigenvectors,
                torch.float64,
                FINEST,
                lambda m, n: {"eig64": 1, "inverse64": 1, "float64": 20},
                "matrices not far from normal, in float64",
            ),
            "newton": Method(
                _newton, torch.float64, 0.0, lambda m, n: {"inverse64": 20, "float64": 80}, "every matrix with a sign"
            ),
            "diagonalized": Method(
                _diagonalized,
                torch.float64,
                0.0,
                lambda m, n: {"inverse64": 25, "svd64": 3, "float64": 150},
                "the same far from normal or near the axis, in a basis of eigenvectors",
            ),
        },
        "square",
        0,
        plain=_plain,
        exact=_exact,
    )
)


@takes_complex("sign", square=True)
@differentiable(derivatives.SIGN, shapes=lambda m, **_: torch.empty_like(m), methods=SIGN.methods, m=2)
def sign_ex(
    m: Inexact[Tensor, "*b n n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Inexact[Tensor, "*b n n"], Certificate]:
    """`sign` with its certificate, never raising for a matrix's values; NaN where there is no sign.

    Args:
        m, method, rtol, certify: as for `sign`.
    Returns: the sign and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `sign`.
    Source: as for `sign`.

    >>> value, certificate = sign_ex(torch.diag(torch.tensor([4.0, -1.0])))
    >>> value.diagonal().tolist(), certificate.converged.item()
    ([1.0, -1.0], True)
    """
    return evaluate(SIGN, m, method=method, rtol=rtol, certify=certify)


def sign(
    m: Inexact[Tensor, "*b n n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> Inexact[Tensor, "*b n n"]:
    """The sign of a matrix: its eigenvectors, with 1 for eigenvalues right of the imaginary axis and −1 left of it.

    sign(M) = M (M²)^(-1/2), with the principal root; (I + sign(M))/2 projects onto an invariant subspace. It is not the
    sign of each entry, which `torch.sign` gives.

    Args:
        m: `(..., n, n)`, without eigenvalues on the imaginary axis.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., n, n)`, the sign, in the dtype of `m`.
    Raises:
        ShapeError: where `m` is not square.
        DtypeError: where `m` is not floating point, real or complex.
        InputError: for an unknown method, or a negative rtol.
        ConvergenceError: where a matrix has no sign, or its error bound is above rtol.
    Cost: an eigendecomposition and some 20 products in float64; far from normal or near the axis about 20 inverses and
    80 products more, half of them for the bound, and then up to 150 products. Accuracy: one rounding of the dtype,
    until an eigenvalue is within 1e-28‖M‖ of the imaginary axis, times the condition of the eigenvectors squared. The
    certificate's residual is ‖MW − WD‖_F / (‖M‖_F ‖W‖_F) of eigenvectors W, or ‖XMX − M‖_F / 2‖M‖_F, of `diagonalized`
    in its basis; the bound of `newton` is an estimate from n = 13.
    Source: Higham, Functions of Matrices (2008), chapter 5; Stewart and Sun, Matrix Perturbation Theory (1990), §V.2.

    >>> sign(torch.tensor([[3.0, 1.0], [0.0, -2.0]]))
    tensor([[ 1.0000,  0.4000],
            [ 0.0000, -1.0000]])
    """
    value, certificate = sign_ex(m, method=method, rtol=rtol, certify=certify)
    require_converged("sign", certificate)
    return value
