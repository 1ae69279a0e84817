"""The principal square root of matrices that need not be symmetric: `sqrtm` with `symmetric=False`."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate
from gramian.linalg.engine import eigenbasis
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import Pair, damped, minus, pair, plus, product
from gramian.linalg.engine.eigenbasis import FINEST, by_eigenvectors, settled
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.function import MatrixFunction, evaluate, of_eigenvalues
from gramian.linalg.engine.loading import Damping
from gramian.linalg.engine.real_form import takes_complex
from gramian.linalg.engine.rounding import norm
from gramian.linalg.engine.similarity import similar
from gramian.linalg.engine.stable import Stable, inverse, solve, solved, stable

STEPS = 60
CORRECTIONS = 2
"""First-order corrections before the one whose remainder the bound counts."""


class Root(NamedTuple):
    """X with X² ≈ A, where Denman and Beavers's iteration converged, and in how many steps."""

    value: Tensor
    converged: Tensor
    steps: int


def denman_beavers(a: Tensor) -> Root:
    """The principal square root of each matrix (B, n, n) by the product form of Denman and Beavers's iteration.

    Source: Cheng, Higham, Kenney, Laub, SIAM J. Matrix Anal. Appl. 22 (2001), equation (3.5).
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    bad = ~a.isfinite().flatten(1).all(1)
    m = torch.where(bad[:, None, None], eye, a)
    x = m
    done, count = torch.zeros_like(bad), 0
    for count in range(1, STEPS + 1):  # noqa: B007
        y, failed = inverse(m)
        if bool(failed.any()):
            bad = bad | failed
            m, x, y = (torch.where(bad[:, None, None], eye, z) for z in (m, x, y))
        finished = done.all()
        far = norm(m - eye)
        mu = torch.where((far > 0.1) & ~bad, (norm(y) / norm(m)) ** 0.25, 1.0)[:, None, None]
        x = x @ (mu * eye + y / mu) / 2
        m = (eye + (mu**2 * m + y / mu**2) / 2) / 2
        done = done | bad | (far < 1e-7)
        if bool(finished):
            break
    return Root(x, done & ~bad & x.isfinite().flatten(1).all(1), count)


def root_equation(root: Root, *, bounded: bool = True) -> Stable:
    """What solves XZ + ZX = C, the derivative of X²; its eigenvalues tell that X is the principal root."""
    eye = torch.eye(root.value.shape[-1], dtype=root.value.dtype, device=root.value.device)
    return stable(torch.where(root.converged[:, None, None], root.value, eye), bounded=bounded)


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(m: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        root = denman_beavers(m.reshape(-1, *m.shape[-2:]))
        return torch.where(root.converged[:, None, None], root.value, torch.nan).reshape(m.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return solved(ctx.saved_tensors[0].mT, grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return solved(ctx.saved_tensors[0], tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, m: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Root.apply(m.movedim(in_dims[0], 0)), 0


def plain_root(m: Tensor) -> Tensor:
    """The principal square root (..., n, n) without a certificate, differentiable; NaN where there is none."""
    out = _Root.apply(m)
    assert isinstance(out, Tensor)
    return out


class Found(NamedTuple):
    """The root of a pair, a bound on its Frobenius error, the reason, the residual, steps, the probability to fail."""

    value: Pair
    error: Tensor
    reason: Tensor
    residual: Tensor
    steps: int
    failure: float


def _of_pair(a: Pair, certify: bool) -> Found:
    """Denman–Beavers to X, Newton's corrections on double-double residuals, and a bound on the remainder of the last.

    The root is X + D* with XD* + D*X = E − D*², E = A − X². So with D from E alone, and β of `stable`,
    ‖D* − D‖ ≤ β‖D*‖², and ‖D*‖ ≤ 2‖D‖ where 4β‖D‖ < 1 (Kantorovich).
    """
    root = denman_beavers(a.hi)
    s = root_equation(root, bounded=certify)
    close = pair(s.n)
    for _ in range(CORRECTIONS):
        e, _ = minus(a, product(close, close))
        d, _ = solve(s, e)
        close = plus(close, torch.where((norm(d) < 0.1 * norm(s.n))[:, None, None], d, 0.0))
    bad = ~(root.converged & s.steps.converged)
    nan = torch.where(bad, math.nan, 0.0)[:, None, None]
    e, e_error = minus(a, product(close, close))
    residual = norm(e) / norm(a.hi).clamp_min(2.0**-1000)
    if not certify:
        seen = torch.where(bad, cert.ON_CUT, torch.where(s.ok, cert.NONE, cert.INACCURATE))
        return Found(
            close._replace(hi=close.hi + nan), torch.full_like(residual, math.inf), seen, residual, root.steps, 0
        )
    d, gap = solve(s, e)
    # The equation is that of the first X.
    slack = norm(close.hi - s.n) + norm(close.lo)
    beta = s.beta / (1 - 2 * s.beta * slack)
    rest = beta * (gap + e_error + 2 * slack * norm(d))
    first = norm(d) + rest
    known = s.ok & root.converged & (2 * s.beta * slack < 0.5) & (4 * beta * first < 0.5)
    value = plus(close, d)
    error = torch.where(known, (beta * (2 * first) ** 2 + rest) * (1 + 2.0**-20), math.inf)
    if not a.hi[0:1].numel():
        error = torch.zeros_like(error)
    reason = torch.where(bad, cert.ON_CUT, torch.where(error.isfinite(), cert.NONE, cert.INACCURATE))
    return Found(value._replace(hi=value.hi + nan), error, reason, residual, root.steps, 3 * s.failure)


def _answer(found: Found, certify: bool) -> Answer:
    if not certify:
        return Answer.bare(found.value.hi, found.reason, found.steps)
    error = (found.error + norm(found.value.lo)) * (1 + 2.0**-20)
    reason = torch.where((found.reason == cert.NONE) & ~error.isfinite(), cert.INACCURATE, found.reason)
    error = torch.where(reason == cert.NONE, error, math.inf)
    return Answer(found.value.hi, error, found.residual, reason, found.steps, found.failure)


def _by_eigenvectors(x: Tensor, *, shift: Tensor, rtol: float, certify: bool = True) -> Answer:
    """By the roots of the eigenvalues."""
    if not x[0:1].numel():
        return _newton(x, shift=shift, rtol=rtol, certify=certify)
    value, error, residual = by_eigenvectors(damped(x, shift), eigenbasis.SQUARE_ROOT)
    return settled(value.hi, error + norm(value.lo), residual, certify)


def _newton(x: Tensor, *, shift: Tensor, rtol: float, certify: bool = True) -> Answer:
    """Of the matrix as it is."""
    return _answer(_of_pair(damped(x, shift), certify), certify)


def _diagonalized(x: Tensor, *, shift: Tensor, rtol: float, certify: bool = True) -> Answer:
    """Of a similar matrix, which is near normal however far the matrix is from it."""
    if not x[0:1].numel():
        return _newton(x, shift=shift, rtol=rtol, certify=certify)
    s = similar(damped(x, shift))
    found = _of_pair(s.b, certify)
    value, error = s.restored(found.value, found.error)
    return _answer(found._replace(value=value, error=error), certify)


def _plain(m: Tensor) -> Tensor:
    w, v = torch.linalg.eig(m)
    return ((v * w.sqrt()[..., None, :]) @ torch.linalg.inv(v)).real


def on_cut(mp: Any, w: Any, size: Any) -> bool:
    """Whether an eigenvalue in mpmath is on the closed negative real axis."""
    tiny = mp.mpf(10) ** -45 * size
    return abs(mp.im(w)) <= tiny and mp.re(w) <= tiny


def _exact(mp: Any, m: Any) -> Any:
    size = mp.norm(m)
    return of_eigenvalues(mp, m, lambda w: None if on_cut(mp, w, size) else mp.sqrt(w))


PRINCIPAL_ROOT = MatrixFunction(
    "sqrtm",
    {
        "eigenvectors": Method(
            _by_eigenvectors,
            torch.float64,
            FINEST,
            lambda m, n: {"eig64": 1, "inverse64": 1, "float64": 20},
            "matrices not far from normal that need not be symmetric, in float64",
        ),
        "denman_beavers": Method(
            _newton,
            torch.float64,
            0.0,
            lambda m, n: {"inverse64": 20, "float64": 80},
            "matrices that need not be symmetric",
        ),
        "diagonalized": Method(
            _diagonalized,
            torch.float64,
            0.0,
            lambda m, n: {"inverse64": 40, "svd64": 1, "float64": 180},
            "the same far from normal, in a basis of eigenvectors",
        ),
    },
    "square",
    Fraction(1, 2),
    plain=_plain,
    exact=_exact,
    damped=True,
)


@takes_complex("sqrtm", square=True)
@differentiable(
    derivatives.PRINCIPAL_ROOT,
    shapes=lambda m, **_: torch.empty_like(m),
    methods=PRINCIPAL_ROOT.methods,
    m=2,
    damping=0,
)
def principal_root_ex(
    m: Tensor, damping: Damping = 0.0, *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Tensor, Certificate]:
    """The principal square root of M + λI with its certificate."""
    return evaluate(PRINCIPAL_ROOT, m, method=method, rtol=rtol, certify=certify, damping=damping)
