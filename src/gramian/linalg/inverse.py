"""The inverse, with certificates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, require_converged
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import (
    Pair,
    Product,
    damped,
    eye_like,
    fine_product,
    minus,
    pair,
    plus,
    product,
    rounding,
    thin_product,
    thin_rough,
)
from gramian.linalg.engine.eigenvalue_ratio import hopeless
from gramian.linalg.engine.equilibrated import FLOOR, inverted, of_columns, of_rows, restored
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.function import MatrixFunction, evaluate, register
from gramian.linalg.engine.loading import Damping
from gramian.linalg.engine.probes import Probes, apply, closer, of_norm, probes
from gramian.linalg.engine.real_form import takes_complex
from gramian.linalg.engine.rounding import LOOSE, U, chain_rounding, gamma, norm
from gramian.linalg.engine.scaling import largest_entry, scale
from gramian.linalg.engine.workspace import scratch

__all__ = ["inv", "inv_ex"]

CHOLESKY32_ERROR = 2.0**-24
"""What a float32 Cholesky inverse loses, as relative error over κ at least; observed."""

TIGHT = 128
"""Up to this side double-double residuals cost little. Beyond it they are taken where plain ones, whose rounding is
far above the error of a float64 inverse, are not enough for what was asked."""

Invert = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From matrices to their inverses, and where they have none."""


def by_lu(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse by LU, zero where a pivot is zero, and where that is."""
    y, info = lapack.inverse(x)
    return _zeroed(y, (info != 0) | ~largest_entry(y).isfinite())


def by_cholesky(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse by Cholesky of the lower triangle, zero where a pivot is not positive, and where that is."""
    lower, info = lapack.cholesky(x, scratch("factor", tuple(x.shape), x.dtype, x))  # of which one triangle counts
    bad = info != 0
    if x.device.type != "cpu" or bool(bad.any()):
        lower = torch.where(bad[:, None, None], torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), lower)
    return _zeroed(torch.cholesky_inverse(lower), bad)


def _zeroed(y: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
    """Zero where it is bad."""
    if y.device.type != "cpu" or bool(bad.any()):
        y = torch.where(bad[:, None, None], 0.0, y)
    return y, bad


def _inverter(invert: Invert, work: torch.dtype) -> Callable[..., Answer | None]:
    """The method that inverts in `work`."""

    def run(
        x: Tensor, *, shift: Tensor, rtol: float, dtype: torch.dtype = torch.float64, certify: bool = True
    ) -> Answer | None:
        m = damped(x, shift)
        narrow = m.hi.to(work)
        if work == torch.float32 and invert is by_cholesky and hopeless(narrow, rtol, CHOLESKY32_ERROR):
            return None
        y, bad = invert(narrow)
        if not certify:
            return Answer.bare(y, torch.where(bad, cert.INACCURATE, cert.NONE))
        p, wide = probes(x.shape[-1], x.device), dtype == torch.float64 and work == torch.float64
        fine = wide and (not math.isfinite(rtol) or x.shape[-1] <= TIGHT)
        error, residual = inverse_bound(m, y, p, fine)
        if not fine and work == torch.float64 and bool((error > 0.9 * rtol * norm(y)).any()):
            error, residual = inverse_bound(m, y, p, True)
        error = torch.where(bad, math.inf, error)
        proven = error.isfinite()
        # Only the last resort decides that a matrix is singular.
        reason = torch.where(proven, cert.NONE, cert.INACCURATE)
        return Answer(y, error, residual, reason, failure=4 * p.failure)

    return run


def inverse_bound(m: Pair, y: Tensor, p: Probes, fine: bool) -> tuple[Tensor, Tensor]:
    """A bound on ‖M⁻¹ − Y‖_F, and on ‖R‖_F, R = I − MY: as M⁻¹ = Y(I − R)⁻¹, it is ‖YR‖_F / (1 − ‖R‖).

    The residual is in plain float64, or in double-double arithmetic if `fine`.
    """
    if not y[0:1].numel():
        zero = torch.zeros(y.shape[0], dtype=torch.float64, device=y.device)
        return zero, zero
    n = y.shape[-1]
    omega = p.omega.expand(y.shape[0], -1, -1)
    size, big = norm(y) * (1 + LOOSE), norm(m.hi)
    # Once for all products, in the memory's order.
    y = scratch("whole", tuple(y.mT.shape), torch.float64, y).copy_(y.mT).mT if y.stride(-2) == 1 else y.double()
    if fine:
        right = thin_product(pair(y), size, omega)
        image = thin_product(m, big, right.hi)
        low = apply(m.hi, right.lo)
        gap = ((omega - image.hi) - image.lo) - low
        gap_error = image.error + (big + norm(m.lo)) * right.error + norm(m.lo) * norm(right.lo)
        gap_error = gap_error + 2 * gamma(n) * big * norm(right.lo) + 4 * U * (norm(gap) + norm(low))
    else:
        right = apply(y, omega)
        image = thin_rough(m, big, right)
        gap = omega - image.hi
        gap_error = image.error + 2 * U * norm(gap) + chain_rounding(n, big + norm(m.lo), size, norm(omega))
    r = of_norm(gap, p, gap_error)
    error = closer(apply(y, gap), p, size * gap_error + chain_rounding(n, size, norm(gap))) / (1 - r)
    return torch.where((r < 0.5) & error.isfinite(), error, math.inf), r


def _lu_refined(x: Tensor, *, shift: Tensor, rtol: float, certify: bool = True) -> Answer:
    """By LU and Newton–Schulz steps Y ← Y + Y(I − MY) on double-double residuals, which converge for uκ < 1."""
    m = damped(x, shift)
    y, bad = by_lu(m.hi)
    close, steps = pair(y), 3
    for _ in range(steps):
        r, _ = minus(eye_like(x), product(m, close))
        # Not a contraction: a step would make it worse, and the bound will say so.
        r = torch.where((norm(r) < 1)[:, None, None], r, 0.0)
        close = plus(close, close.hi @ r)
    if not certify:
        reason = torch.where(bad, cert.INACCURATE, cert.NONE)
        return Answer.bare(torch.where(bad[:, None, None], math.nan, close.hi), reason, steps)
    return _certified(m, close, bad, product, steps)


def _certified(m: Pair, y: Pair, bad: Tensor, times: Product, steps: int) -> Answer:
    """M⁻¹ = Y(I − R)⁻¹ with R = I − MY, so ‖M⁻¹ − Y‖_F ≤ ‖YR‖_F + ‖YR‖_F‖R‖/(1 − ‖R‖)."""
    r, r_error = minus(eye_like(y.hi), times(m, y))
    size = norm(r) + r_error
    # ‖Y‖ times the rounding of R, row by row: in graded matrices large rows of Y meet small ones of M.
    spread = rounding(m, y, times)
    blur = sum(
        ((y.hi.abs() @ row[..., None]).norm(dim=(1, 2)) * column.norm(dim=1) for row, column in spread), size * 0
    )
    step = norm(y.hi @ r) + blur + norm(y.hi) * gamma(y.hi.shape[-1] + 3) * norm(r) + norm(y.lo) * size
    step = step * (1 + 2.0**-20)
    proven = (size < 1) & ~bad
    error = torch.where(proven, step / (1 - size) + norm(y.lo), math.inf)
    # Only the last resort decides that a matrix is singular.
    return Answer(y.hi, error, norm(r), torch.where(proven, cert.NONE, cert.INACCURATE), steps)


def _equilibrated(x: Tensor, *, shift: Tensor, rtol: float) -> Answer:
    """By LU of the equilibrated matrix, and steps Y ← Y + Y(I − MY) on double-double residuals.

    With R = I − MY for the equilibrated M and S_c, S_r the powers of two that give the inverse X = S_c Y(I − R)⁻¹ S_r:
    ‖X − S_c Y S_r‖_F ≤ ‖S_c YR S_r‖_F + ‖S_c YR‖_F ‖R S_r‖_F / (1 − ‖R‖). It is computed without `certify` too: only R
    tells whether there is an inverse.
    """
    found = inverted(damped(x, shift))
    m, y, s = found.m, found.y, found.scaling
    if not x[0:1].numel():
        zero = torch.zeros_like(shift)
        return Answer(y.hi, zero, zero, zero.long())
    n, image = x.shape[-1], fine_product(m, y)
    r, r_error = minus(eye_like(y.hi), image)
    right, high, low = of_columns(r, s.rows), of_rows(y.hi, s.columns), of_rows(y.lo, s.columns)
    step, across = of_rows(y.hi @ r, s.columns), high.abs() @ torch.stack([r.abs(), right.abs()], 1).movedim(1, 0)
    # The rounding of I − MY, and that of the product, which is entry by entry at most the sum of |row column|.
    own = (r_error - image.error).clamp_min(0) + 4 * U * r_error + (1 + norm(y.hi)) * n * FLOOR
    size, third = norm(r) + own, norm(right) + own
    first = norm(of_columns(step, s.rows)) + norm(high) * own + gamma(n + 8) * norm(across[1])
    second = norm(step) + norm(high) * own + gamma(n + 8) * norm(across[0])
    for row, column in rounding(m, y, fine_product):
        reach, length = (high.abs() @ row[..., None]).norm(dim=(1, 2)), column.norm(dim=1)
        scaled = scale(column[:, None], -s.rows[:, None]).norm(dim=(1, 2))
        first, second = first + reach * scaled, second + reach * length
        size, third = size + row.norm(dim=1) * length, third + row.norm(dim=1) * scaled
    first, second = first + norm(low) * third, second + norm(low) * size
    error = (first + second * third / (1 - size)) * (1 + 2.0**-20) + norm(of_columns(low, s.rows))
    error = scale(error, -s.whole) + n * 2.0**-1074
    value = restored(y.hi, s)
    proven = (size < 1) & error.isfinite() & value.isfinite().flatten(1).all(1)
    reason = torch.where(proven, cert.NONE, cert.SINGULAR)
    value = torch.where(proven[:, None, None], value, math.nan)
    return Answer(value, torch.where(proven, error, math.inf), norm(r), reason, found.steps)


def exact_inverse(mp: Any, m: Any) -> Any:
    try:
        y = mp.inverse(m)
    except (ZeroDivisionError, TypeError):  # a zero pivot; mpmath finds no row to swap where a column is all zero
        return None
    return y if mp.norm(m) * mp.norm(y) < mp.mpf(10) ** 40 else None


INV = register(
    MatrixFunction(
        "inv",
        {
            "cholesky32": Method(
                _inverter(by_cholesky, torch.float32),
                torch.float64,
                1e-5,
                lambda m, n: {"cholesky32": 4, "thin64": 4, "float32": 0.2},
                "κ ≤ 1e3 at 1e-4; matrices that are symmetric to the last bit",
                narrow=True,
                symmetric=True,
            ),
            "lu32": Method(
                _inverter(by_lu, torch.float32),
                torch.float64,
                1e-5,
                lambda m, n: {"inverse32": 1, "thin64": 4},
                "κ ≤ 1e3 at 1e-4",
                narrow=True,
            ),
            "cholesky": Method(
                _inverter(by_cholesky, torch.float64),
                torch.float64,
                1e-12,
                lambda m, n: {"cholesky64": 3.2, "thin64": 8},
                "float64; κ ≤ 1e8 at 1e-6; matrices that are symmetric to the last bit",
                symmetric=True,
            ),
            "lu": Method(
                _inverter(by_lu, torch.float64),
                torch.float64,
                1e-12,
                lambda m, n: {"inverse64": 1, "thin64": 8},
                "float64; κ ≤ 1e8 at 1e-6",
            ),
            "lu_refined": Method(
                _lu_refined,
                torch.float64,
                1e-14,
                lambda m, n: {"inverse64": 1, "float64": 40},
                "κ to 1e15, refined with double-double residuals",
            ),
            "equilibrated": Method(
                _equilibrated,
                torch.float64,
                0.0,
                lambda m, n: {"inverse64": 1, "float64": 60},
                "bad scaling, and κ to 1e20 after equilibration",
            ),
        },
        "square",
        -1,
        plain=torch.linalg.inv,
        exact=exact_inverse,
        damped=True,
    )
)


@takes_complex("inv", square=True)
@differentiable(derivatives.INVERSE, shapes=lambda m, **_: torch.empty_like(m), methods=INV.methods, m=2, damping=0)
def inv_ex(
    m: Inexact[Tensor, "*b n n"],
    damping: Damping = 0.0,
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> tuple[Inexact[Tensor, "*b n n"], Certificate]:
    """`inv` with its certificate, never raising for a matrix's values; NaN where there is no inverse.

    Args:
        m, damping, method, rtol, certify: as for `inv`.
    Returns: the inverse and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `inv`.
    Source: as for `inv`.

    >>> value, certificate = inv_ex(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    >>> value.diagonal().tolist(), certificate.converged.item(), certificate.method_names
    ([0.5, 0.25], True, ['lu'])
    """
    return evaluate(INV, m, method=method, rtol=rtol, certify=certify, damping=damping)


def inv(
    m: Inexact[Tensor, "*b n n"],
    damping: Damping = 0.0,
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> Inexact[Tensor, "*b n n"]:
    """The inverse of M + λI.

    inv(M, λ) = (M + λI)⁻¹.

    Args:
        m: `(..., n, n)`.
        damping: λ ≥ 0, absolute, one number or one per matrix.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., n, n)`, the inverse, in the dtype of `m`.
    Raises:
        ShapeError: where `m` is not square, or `damping` does not fit it.
        DtypeError: where `m` is not floating point, real or complex.
        InputError: for an unknown method, or a negative damping or rtol.
        ConvergenceError: where a matrix is singular, or its error bound is above rtol.
    Cost: in float32 products at 1024², 4 by Cholesky, or by LU where M is not symmetric, while κ allows; 6 in float64;
    30 more to refine (float64). Accuracy: what `rtol` asks for, until κ of the matrix with
    equilibrated rows and columns nears 1e20. The certificate's residual is a bound on ‖I − MY‖_F.
    Source: Higham, Accuracy and Stability (2002), §14.1; Rump, Acta Numerica 19 (2010), §10.

    >>> inv(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), damping=1.0)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    value, certificate = inv_ex(m, damping, method=method, rtol=rtol, certify=certify)
    require_converged("inv", certificate)
    return value
