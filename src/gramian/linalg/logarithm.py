"""The matrix logarithm, with certificates."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, require_converged
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import Pair, minus, pair, plus, product
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.exponential import exponential, two_norm
from gramian.linalg.engine.function import MatrixFunction, evaluate, register
from gramian.linalg.engine.rounding import U, norm
from gramian.linalg.engine.scaling import scale
from gramian.linalg.engine.stable import Stable, inverse, solve
from gramian.linalg.principal_root import denman_beavers, root_equation

__all__ = ["logm", "logm_ex"]

NEAR = 0.25
"""‖A^(1/2ᵏ) − I‖₂ at which the Padé approximant of order `ORDER` is good to u (0.264 for 7; Higham (2008), table 11.1)."""

ORDER = 7
ROOTS = 40
CORRECTIONS = 2
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
        equations: those of the roots A^(1/2), A^(1/4), …
        parts: the (I + xY)⁻¹ of the last one, I + Y.
        ok: where all roots are principal ones and Y is small.
        beta: a bound on the norm of the derivative, or an estimate.
        blur: the relative error of that norm, from the roots' own errors.
        growth: a bound on ‖e^(tX)‖₂ for 0 ≤ t ≤ 1.
        steps: of the iterations.
    """

    value: Tensor
    equations: list[Stable]
    parts: list[Tensor]
    ok: Tensor
    beta: Tensor
    blur: Tensor
    growth: Tensor
    steps: int


def _roots(a: Tensor) -> Roots:
    """Inverse scaling and squaring. Al-Mohy and Higham, SIAM J. Sci. Comput. 34 (2012), with other roots than Schur's."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    ok = a.isfinite().flatten(1).all(1)
    x = torch.where(ok[:, None, None], a, eye)
    beta, away, growth = torch.ones_like(x[:, 0, 0]), torch.zeros_like(x[:, 0, 0]), two_norm(x).clamp_min(1.0)
    blur, steps = torch.ones_like(away), 0
    equations: list[Stable] = []
    while len(equations) < ROOTS and bool((two_norm(x - eye) > NEAR).any()):
        root = denman_beavers(x)
        s = root_equation(root)
        ok = ok & s.ok & root.converged
        safe = torch.where(ok[:, None, None], s.n, eye)
        # How far it is from the exact root of the exact matrix.
        away = 2 * s.beta * (norm(x - safe @ safe) + away)
        blur = blur * (1 + 2 * s.beta * away)
        ok = ok & (s.beta * away < 0.01)
        beta = 2 * beta * s.beta
        growth = growth * two_norm(safe).clamp_min(1.0)
        x, steps = safe, steps + root.steps + len(s.steps.factors)
        equations.append(s)
    y = x - eye
    small = two_norm(y)
    ok = ok & (small < 0.5)
    parts = [inverse(eye + node * y)[0] for node, _ in gauss_legendre()]
    value = sum((weight * part for (_, weight), part in zip(gauss_legendre(), parts, strict=True)), torch.zeros_like(y))
    value = 2.0 ** len(equations) * (y @ value)
    beta = torch.where(ok, beta / (1 - small).clamp_min(0.5) ** 2, math.inf)
    return Roots(value, equations, parts, ok, beta, blur - 1, growth * (2 * small).exp(), steps)


def _along(r: Roots, e: Tensor) -> Tensor:
    """The derivative of the logarithm along E."""
    for s in r.equations:
        e, _ = solve(s, e)
    out = torch.zeros_like(e)
    for (_, weight), part in zip(gauss_legendre(), r.parts, strict=True):
        out = out + weight * (part @ e @ part)
    return 2.0 ** len(r.equations) * out


def _inverse_scaling(x: Tensor, *, rtol: float) -> Answer:
    """Inverse scaling and squaring to X, Newton's corrections on A − e^X in double-double, and a bound on the remainder.

    With X* = X + D, e^X + L(D) + R = A, where L is the derivative of the exponential at X and ‖R‖ ≤ ‖D‖²g³/2 for
    g ≥ ‖e^(tX)‖₂, 0 ≤ t ≤ 1. So ‖D‖ ≤ 2(‖L⁻¹E‖ + …) where β g³ ‖D‖ is small, β ≥ ‖L⁻¹‖ (Kantorovich).
    """
    n = x.shape[-1]
    if not x[0:1].numel():
        zero = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        return Answer(x, zero, zero, torch.full(zero.shape, cert.NONE, device=x.device))
    eye = torch.eye(n, dtype=x.dtype, device=x.device)
    down = _middle(x)
    a = pair(scale(x, -down))
    r = _roots(a.hi)
    close = pair(torch.where(r.ok[:, None, None], r.value, 0.0))
    first = torch.zeros_like(r.beta)
    for step in range(CORRECTIONS + 1):
        found = exponential(close, product)
        power = _restored(found.value, found.exponent)
        e, e_error = minus(a, power)
        d = _along(r, torch.where(r.ok[:, None, None], e, 0.0))
        if step < CORRECTIONS:
            first = first + norm(d)
        close = plus(close, torch.where((norm(d) < 0.1)[:, None, None], d, 0.0))
    curve = r.beta * r.growth**3
    slack = r.blur + 2 * curve * (first + norm(d))
    rest = 1.5 * r.beta * (e_error + (slack + 1e-10) * norm(e))
    bound = 2 * rest + 2 * curve * (norm(d) + rest) ** 2
    known = r.ok & (slack < 0.3) & (curve * (first + 2 * norm(d) + 2 * rest) < 0.1) & (norm(d) < 0.1)
    # log A = X + (ln 2 · down) I.
    value = plus(close, (down * LN2_LOW)[:, None, None] * eye)
    high = plus(Pair(value.hi, value.lo, value.error), (down * LN2)[:, None, None] * eye)
    lost = torch.where(down == 0, 0.0, 2 * U * math.sqrt(n) * down.abs())
    # down · LN2 is rounded by U times itself at most, and LN2 is exact to 2^-106.
    error = torch.where(known, (bound + norm(high.lo) + lost) * (1 + 2.0**-20), math.inf)
    reason = torch.where(r.ok, torch.where(known, cert.NONE, cert.INACCURATE), cert.ON_CUT)
    out = torch.where(r.ok[:, None, None], high.hi, math.nan)
    residual = norm(e) / norm(a.hi).clamp_min(2.0**-1000)
    estimated = any(s.estimated for s in r.equations)
    return Answer(out, error, residual, reason, r.steps, math.nan if estimated else 0.0)


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
    """By roots and a series in many digits."""
    from gramian.linalg.principal_root import exact_root

    with mp.workdps(120):
        size = mp.norm(m)
        if not size:
            return None
        down = int(mp.log(size, 2)) if not mp.mpf("0.1") < size < 10 else 0
        x, k = m * mp.mpf(2) ** -down, 0
        eye = mp.eye(m.rows)
        while mp.norm(x - eye) > mp.mpf("0.01"):
            x, k = exact_root(mp, x), k + 1
            if x is None or k > 300:
                return None
        # log((I + Z)/(I − Z)) = 2(Z + Z³/3 + …), Z = (A − I)(A + I)⁻¹
        z = (x - eye) * (x + eye) ** -1
        total, power, square = z.copy(), z, z * z
        for i in range(3, 60, 2):
            power = power * square
            total = total + power / i
        return 2 * total * mp.mpf(2) ** k + down * mp.log(2) * eye


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


@differentiable(derivatives.LOGARITHM, shapes=lambda m, **_: torch.empty_like(m), methods=LOGM.methods, m=2)
def logm_ex(
    m: Float[Tensor, "*b n n"], *, method: str = "auto", rtol: float | None = None
) -> tuple[Float[Tensor, "*b n n"], Certificate]:
    """`logm` with its certificate, never raising for a matrix's values; NaN where there is no principal logarithm.

    Args:
        m, method, rtol: as for `logm`.
    Returns: the logarithm and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `logm`.
    Source: as for `logm`.

    >>> value, certificate = logm_ex(torch.diag(torch.tensor([1.0, -1.0])))
    >>> certificate.converged.item(), certificate.reasons[0][:28]
    (False, 'the answer does not exist: t')
    """
    return evaluate(LOGM, m, method=method, rtol=rtol)


def logm(m: Float[Tensor, "*b n n"], *, method: str = "auto", rtol: float | None = None) -> Float[Tensor, "*b n n"]:
    """The principal logarithm of a square matrix.

    logm(M) = X with e^X = M and eigenvalues whose imaginary parts are between −π and π.

    Args:
        m: `(..., n, n)`, without eigenvalues on the negative real axis or at zero.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
    Returns: `(..., n, n)`, the logarithm, in the dtype of `m`.
    Raises:
        ShapeError: where `m` is not square.
        DtypeError: where `m` is not real floating point.
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
    value, certificate = logm_ex(m, method=method, rtol=rtol)
    require_converged("logm", certificate)
    return value
