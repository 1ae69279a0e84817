"""The matrix logarithm, with certificates."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, require_converged
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import Pair, minus, pair, plus, product
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.exponential import SCHEMES, exponential, two_norm
from gramian.linalg.engine.function import MatrixFunction, evaluate, of_eigenvalues, register
from gramian.linalg.engine.real_form import takes_complex
from gramian.linalg.engine.rounding import U, norm
from gramian.linalg.engine.scaling import pow2, scale
from gramian.linalg.engine.stable import Stable, directions, frobenius, inverse, operator_norm, refined
from gramian.linalg.principal_root import denman_beavers, on_cut, root_equation

__all__ = ["logm", "logm_ex"]

NEAR = 0.25
"""‖A^(1/2ᵏ) − I‖₂ at which the Padé approximant of order `ORDER` is good to u (0.264 for 7).

Higham, Functions of Matrices (2008), table 11.1."""

ORDER = 7
ROOTS = 40
CORRECTIONS = 2
GRID = 64
LN2, LN2_LOW = math.log(2), 2.3190468138462996e-17
"""ln 2 to 106 bits."""


@lru_cache
def gauss_legendre(order: int = ORDER) -> list[tuple[float, float]]:
    """Nodes and weights on (0, 1), with which Σ w Y(I + xY)⁻¹ is the Padé approximant of log(I + Y)."""
    off = torch.arange(1, order, dtype=torch.float64)
    off = off / (4 * off**2 - 1).sqrt()
    x, v = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return list(zip(((x + 1) / 2).tolist(), v[0].square().tolist(), strict=True))


class Roots(NamedTuple):
    """What log(A) = 2ᵏ log(A^(1/2ᵏ)) and its derivative are made of.

    Attributes:
        value: the logarithm.
        equations: those of the roots A^(1/2), A^(1/4), … and, for each, the matrices (B,) that took this root.
        counts: `(B,)`, k.
        parts: the (I + xY)⁻¹ of the last one, I + Y.
        ok: where all roots are principal ones, and Y is small.
        steps: of the iterations.
    """

    value: Tensor
    equations: list[tuple[Stable, Tensor]]
    counts: Tensor
    parts: list[Tensor]
    ok: Tensor
    steps: int


def _roots(a: Tensor) -> Roots:
    """Inverse scaling and squaring (Al-Mohy and Higham, SIAM J. Sci. Comput. 34 (2012)) without Schur forms."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    ok = a.isfinite().flatten(1).all(1)
    x = torch.where(ok[:, None, None], a, eye)
    steps, counts = 0, torch.zeros(len(x), dtype=torch.long, device=x.device)
    equations: list[tuple[Stable, Tensor]] = []
    while len(equations) < ROOTS:
        far = ok & (two_norm(x - eye) > NEAR)
        if not bool(far.any()):
            break
        root = denman_beavers(torch.where(far[:, None, None], x, eye))
        s = root_equation(root)
        ok = ok & s.ok & root.converged
        far = far & ok
        x = torch.where(far[:, None, None], s.n, torch.where(ok[:, None, None], x, eye))
        steps, counts = steps + root.steps + len(s.steps.factors), counts + far
        equations.append((s, far))
    y = x - eye
    parts = [inverse(eye + node * y)[0] for node, _ in gauss_legendre()]
    value = sum((weight * part for (_, weight), part in zip(gauss_legendre(), parts, strict=True)), torch.zeros_like(y))
    value = scale(y @ value, counts)
    return Roots(value, equations, counts, parts, ok & (two_norm(y) < 0.5), steps)


def _along(r: Roots, e: Tensor) -> Tensor:
    """The derivative of the logarithm along E (..., B, n, n)."""
    for s, far in r.equations:
        e = torch.where(far[:, None, None], refined(s, e), e)
    out = torch.zeros_like(e)
    for (_, weight), part in zip(gauss_legendre(), r.parts, strict=True):
        out = out + weight * (part @ e @ part)
    return out * pow2(r.counts)[:, None, None]


def _slope(x: Tensor, d: Tensor) -> Tensor:
    """The derivative of the exponential at X (B, n, n) along D (..., B, n, n), times a power of two near ‖X‖/‖D‖."""
    n = x.shape[-1]
    size = d.abs().amax((-2, -1), keepdim=True)
    unit = torch.where(size > 0, size, 1.0)
    x = x.expand_as(d)
    block = torch.cat([torch.cat([x, d / unit], -1), torch.cat([torch.zeros_like(x), x], -1)], -2)
    return torch.linalg.matrix_exp(block)[..., :n, n:] * unit


def _curvature(x: Tensor) -> Tensor:
    """A bound on half the second derivative of the exponential at X: ‖e^(uX)‖₂ ‖e^(vX)‖₂ ‖e^(wX)‖₂/2, u + v + w = 1.

    The norms are known where u is a multiple of 1/GRID, and between them within e^(‖X‖/GRID).
    """
    part = torch.linalg.matrix_exp(x / GRID)
    power, sizes = part, [torch.zeros_like(x[:, 0, 0])]
    for _ in range(GRID):
        top = power.abs().amax((-2, -1)).clamp_min(2.0**-1000)
        sizes.append((top * two_norm(power / top[:, None, None])).log())
        power = power @ part
    g = torch.stack(sizes, -1)
    pairs = torch.stack([(g[:, : i + 1] + g[:, : i + 1].flip(-1)).amax(-1) for i in range(GRID + 1)], -1)
    most = (g + pairs.flip(-1)).amax(-1)
    return 0.5 * (most + 3 * (two_norm(x / 2.0**20) * 2.0**20) / GRID).exp() * (1 + 1e-6)


def _correction(a: Pair, r: Roots, x: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """E = A − e^X, a bound on its error, and D ≈ L⁻¹E, zero where it is too large to correct anything."""
    found = exponential(x, product, SCHEMES[-2:-1])
    e, e_error = minus(a, _restored(found.value, found.exponent))
    d = _along(r, e)
    return e, e_error, torch.where((norm(d) < 0.1)[:, None, None], d, 0.0)


def _inverse_scaling(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """Inverse scaling and squaring to X, Newton's corrections on A − e^X in double-double, and a bound on the rest.

    With X* = X + D*, e^X + L(D*) + R = A, where L is the derivative of the exponential at X and ‖R‖ ≤ c‖D*‖² with
    half the bound c on its second derivative. With E = A − e^X, D ≈ L⁻¹E and β ≥ ‖L⁻¹‖,
    ‖D* − D‖ ≤ β(‖E − L(D)‖ + ‖R‖), and ‖D*‖ is at most twice ‖L⁻¹E‖ where βc times that is small (Kantorovich). The
    factors 2 below are for the way from X to X*.
    """
    n = x.shape[-1]
    if not x[0:1].numel():
        zero = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        return Answer(x, zero, zero, torch.full(zero.shape, cert.NONE, device=x.device))
    eye = torch.eye(n, dtype=x.dtype, device=x.device)
    down = _middle(x)
    shift = down.double()
    a = pair(scale(x, -down))
    r = _roots(a.hi)
    keep = r.ok[:, None, None]
    target = Pair(torch.where(keep, a.hi, eye), a.lo, a.error)
    close = pair(torch.where(keep, r.value, 0.0))
    e, e_error, d = _correction(target, r, close)
    for _ in range(CORRECTIONS):
        close = plus(close, d)
        e, e_error, d = _correction(target, r, close)
    # log A = X + (ln 2 · down) I.
    value = plus(plus(close, d), (shift * LN2_LOW)[:, None, None] * eye)
    high = plus(value, (shift * LN2)[:, None, None] * eye)
    out = torch.where(keep, high.hi, math.nan)
    if not certify:
        return Answer.bare(out, torch.where(r.ok, cert.NONE, cert.ON_CUT), r.steps)
    along = directions(x)
    images = _along(r, along.basis.expand(-1, x.shape[0], -1, -1))
    left = frobenius(along.basis - _slope(close.hi, images), along)
    beta = torch.where(left < 0.25, 1.5 * operator_norm(images, along), math.inf)
    curve = 2 * beta * _curvature(close.hi)
    rest = beta * (norm(e - _slope(close.hi, d)) + e_error + 1e-8 * norm(e))
    first = norm(d) + rest
    known = r.ok & (curve * first < 0.1)
    # The product with ln 2 is rounded.
    lost = torch.where(down == 0, 0.0, U * math.sqrt(n) * LN2 * shift.abs())
    error = torch.where(known, (4 * curve * first**2 + rest + norm(high.lo) + lost) * (1 + 2.0**-20), math.inf)
    reason = torch.where(r.ok, torch.where(known, cert.NONE, cert.INACCURATE), cert.ON_CUT)
    residual = norm(e) / norm(a.hi).clamp_min(2.0**-1000)
    return Answer(out, error, residual, reason, r.steps, (len(r.equations) + 2) * along.failure)


def _middle(x: Tensor) -> Tensor:
    """The power of two nearest to the geometric mean of |λ|; 0 where that is near 1 or not known."""
    size = torch.linalg.slogdet(torch.where(x.isfinite(), x, 0.0)).logabsdet / (LN2 * x.shape[-1])
    size = torch.where(size.isfinite() & (size.abs() > 2), size, 0.0)
    return size.round().long()


def _restored(x: Pair, exponent: Tensor) -> Pair:
    return Pair(scale(x.hi, exponent), scale(x.lo, exponent), scale(x.error, exponent))


def _plain(m: Tensor) -> Tensor:
    w, v = torch.linalg.eig(m)
    return ((v * w.log()[..., None, :]) @ torch.linalg.inv(v)).real


def _exact(mp: Any, m: Any) -> Any:
    size = mp.norm(m)
    return of_eigenvalues(mp, m, lambda w: None if on_cut(mp, w, size) else mp.log(w))


LOGM = register(
    MatrixFunction(
        "logm",
        {
            "inverse_scaling": Method(
                _inverse_scaling,
                torch.float64,
                0.0,
                lambda m, n: {"inverse64": 150, "float64": 600},
                "every matrix with a principal logarithm",
            ),
        },
        "square",
        "unscaled",
        plain=_plain,
        exact=_exact,
    )
)


@takes_complex("logm", square=True)
@differentiable(derivatives.LOGARITHM, shapes=lambda m, **_: torch.empty_like(m), methods=LOGM.methods, m=2)
def logm_ex(
    m: Inexact[Tensor, "*b n n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Inexact[Tensor, "*b n n"], Certificate]:
    """`logm` with its certificate, never raising for a matrix's values; NaN where there is no principal logarithm.

    Args:
        m, method, rtol, certify: as for `logm`.
    Returns: the logarithm and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `logm`.
    Source: as for `logm`.

    >>> value, certificate = logm_ex(torch.diag(torch.tensor([1.0, -1.0])))
    >>> certificate.converged.item(), certificate.reasons[0][:28]
    (False, 'the answer does not exist: t')
    """
    return evaluate(LOGM, m, method=method, rtol=rtol, certify=certify)


def logm(
    m: Inexact[Tensor, "*b n n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> Inexact[Tensor, "*b n n"]:
    """The principal logarithm of a square matrix.

    logm(M) = X with e^X = M and eigenvalues whose imaginary parts are between −π and π.

    Args:
        m: `(..., n, n)`, without eigenvalues on the negative real axis or at zero.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., n, n)`, the logarithm, in the dtype of `m`.
    Raises:
        ShapeError: where `m` is not square.
        DtypeError: where `m` is not floating point, real or complex.
        InputError: for an unknown method, or a negative rtol.
        ConvergenceError: where there is no principal logarithm, or the error bound is above rtol.
    Cost: for each of 5 to 12 square roots 15 inverses, and 600 products in all, in float64. Accuracy: one rounding of
    the dtype, until κ nears 1e12. The certificate's residual is ‖M − e^X‖_F / ‖M‖_F; its bound is an estimate of
    unknown probability from n = 13.
    Source: Al-Mohy and Higham, SIAM J. Sci. Comput. 34 (2012); Higham, Functions of Matrices (2008), chapter 11.

    >>> logm(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    tensor([[0., 1.],
            [0., 0.]])
    """
    value, certificate = logm_ex(m, method=method, rtol=rtol, certify=certify)
    require_converged("logm", certificate)
    return value
