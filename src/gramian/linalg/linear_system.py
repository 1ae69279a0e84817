"""The solution of linear systems, with certificates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from gramian.errors import ShapeError
from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, require_converged
from gramian.linalg.engine.batches import broadcast
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
    rough,
    thin_rough,
    two_sum,
)
from gramian.linalg.engine.equilibrated import FLOOR, inverted, of_rows
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.function import MatrixFunction, evaluate, register
from gramian.linalg.engine.loading import Damping, check, load
from gramian.linalg.engine.probes import Probes, apply, of_norm, probes
from gramian.linalg.engine.real_form import real_form, stacked, unstacked
from gramian.linalg.engine.rounding import chain_rounding, gamma, norm
from gramian.linalg.engine.scaling import scale
from gramian.linalg.inverse import Invert, by_cholesky, by_lu, exact_inverse

__all__ = ["solve", "solve_ex"]


def _solver(invert: Invert, work: torch.dtype, times: Product, steps: int) -> Callable[..., Answer]:
    """The method that takes Y ≈ M⁻¹ in `work`, then z ← z + Y(b − Mz) so many times.

    With I − YM = L, ‖M⁻¹b − z‖_F ≤ ‖Y(b − Mz)‖_F / (1 − ‖L‖).
    """

    def run(x: Tensor, *, shift: Tensor, b: Tensor, rtol: float, certify: bool = True) -> Answer:
        m, right = damped(x, shift), pair(b)
        p = probes(x.shape[-1], x.device)
        y, bad = invert(m.hi.to(work))
        y, image = y.double(), _multiplier(m, times)  # once for all products
        z = pair(apply(y, b)) if y[0:1].numel() else pair(b)
        for _ in range(steps if y[0:1].numel() else 0):
            r, _ = minus(right, image(z))
            z = plus(z, apply(y, r))
        singular = cert.SINGULAR if times is product else cert.INACCURATE
        if not certify:
            value = torch.where(bad[:, None, None], math.nan, z.hi)
            return Answer.bare(value, torch.where(bad, singular, cert.NONE), steps)
        size = _left_defect(image, y, p, times)
        r, r_error = minus(right, image(z))
        step = norm(y @ r) + norm(y) * (r_error + gamma(x.shape[-1] + 1) * norm(r))
        zero = norm(b) == 0
        proven = (size < 1) & ~bad
        error = torch.where(zero, 0.0, step / (1 - size) + norm(z.lo))
        error = torch.where(proven, error, math.inf)
        # Only the last resort decides that a matrix is singular.
        reason = torch.where(proven, cert.NONE, cert.INACCURATE)
        value = torch.where(bad[:, None, None], math.nan, z.hi)
        return Answer(value, error, norm(r) / norm(b).clamp_min(2.0**-1000), reason, steps, p.failure)

    return run


def _equilibrated(x: Tensor, *, shift: Tensor, b: Tensor, rtol: float) -> Answer:
    """By the inverse Y of the equilibrated matrix M, and steps z ← z + Y(b − Mz).

    With R = I − MY, M⁻¹b − z = Y(I − R)⁻¹(b − Mz); and S_c takes z to the scale of the answer. Without `certify` R is
    computed too: only it tells whether there is a solution.
    """
    found = inverted(damped(x, shift))
    m, y, s = found.m, found.y, found.scaling
    if not x[0:1].numel():
        zero = torch.zeros_like(shift)
        return Answer(b, zero, zero, zero.long())
    right, n = pair(of_rows(b, s.rows)), x.shape[-1]
    z, steps = pair(torch.zeros_like(b)), 4
    for _ in range(steps):
        r, _ = minus(right, fine_product(m, z))
        d = product(y, pair(r))
        hi, low = two_sum(z.hi, d.hi)
        z = Pair(hi, low + (z.lo + d.lo), z.error)
    defect, defect_error = minus(eye_like(x), fine_product(m, y))
    size = norm(defect) + defect_error + n * FLOOR
    r, r_error = minus(right, fine_product(m, z))
    length, reach = norm(r), norm(of_rows(y.hi, s.columns)) + norm(of_rows(y.lo, s.columns)) + n * FLOOR
    step = norm(of_rows(y.hi @ r, s.columns)) + reach * (gamma(n + 1) * length + r_error + n * FLOOR)
    step = (step + reach * size / (1 - size) * length) * (1 + 2.0**-20) + norm(of_rows(z.lo, s.columns))
    value = scale(of_rows(z.hi, s.columns), -s.whole)
    error = scale(step, -s.whole) + n * 2.0**-1074
    proven = (size < 1) & error.isfinite() & value.isfinite().flatten(1).all(1)
    error = torch.where(norm(b) == 0, 0.0, error)
    reason = torch.where(proven, cert.NONE, cert.SINGULAR)
    value = torch.where(proven[:, None, None], value, math.nan)
    residual = norm(scale(r, s.rows)) / norm(b).clamp_min(2.0**-1000)
    return Answer(value, torch.where(proven, error, math.inf), residual, reason, found.steps + steps)


def _multiplier(m: Pair, times: Product) -> Callable[[Pair], Pair]:
    """Products of m with thin pairs by `times`, which measure m once."""
    if times is not rough:
        return lambda z: times(m, z)
    size = norm(m.hi)

    def thin(z: Pair) -> Pair:
        image = thin_rough(m, size, z.hi)
        return image._replace(error=image.error + (size + norm(m.lo)) * (norm(z.lo) + z.error))

    return thin


def _left_defect(image: Callable[[Pair], Pair], y: Tensor, p: Probes, times: Product) -> Tensor:
    """A bound on ‖I − YM‖_F, from products with M."""
    if not y[0:1].numel():
        return torch.zeros(y.shape[0], dtype=torch.float64, device=y.device)
    n = y.shape[-1]
    omega = p.omega.expand(y.shape[0], -1, -1)
    right = image(pair(omega))
    left, left_error = minus(pair(omega), _multiplier(pair(y), times)(right))
    return of_norm(left, p, left_error + chain_rounding(n, norm(y), norm(right.hi)))


def _exact_solution(mp: Any, m: Any, b: Tensor) -> Any:
    y = exact_inverse(mp, m)
    return None if y is None else y * mp.matrix(b.to(torch.float64).tolist())


SOLVE = register(
    MatrixFunction(
        "solve",
        {
            "cholesky32": Method(
                _solver(by_cholesky, torch.float32, rough, steps=3),
                torch.float64,
                2e-6,
                lambda m, n: {"cholesky32": 4, "thin64": 14},
                "κ ≤ 1e5, refined in float64; matrices that are symmetric to the last bit",
                narrow=True,
                symmetric=True,
            ),
            "lu32": Method(
                _solver(by_lu, torch.float32, rough, steps=3),
                torch.float64,
                2e-6,
                lambda m, n: {"inverse32": 1, "thin64": 14},
                "κ ≤ 1e5, refined in float64",
                narrow=True,
            ),
            "lu": Method(
                _solver(by_lu, torch.float64, rough, steps=1),
                torch.float64,
                2e-6,
                lambda m, n: {"inverse64": 1, "thin64": 18},
                "float64",
            ),
            "lu_refined": Method(
                _solver(by_lu, torch.float64, product, steps=4),
                torch.float64,
                1e-14,
                lambda m, n: {"inverse64": 1, "thin64": 40},
                "κ to 1e14, refined with double-double residuals",
            ),
            "equilibrated": Method(
                _equilibrated,
                torch.float64,
                0.0,
                lambda m, n: {"inverse64": 1, "float64": 60, "thin64": 40},
                "bad scaling, and κ to 1e20 after equilibration",
            ),
        },
        "square",
        -1,
        plain=lambda m, b: torch.linalg.solve(m, b),
        exact=_exact_solution,
        examples={"solve": lambda a: {"b": torch.ones_like(a[..., :1])}},
        damped=True,
    )
)


@differentiable(
    derivatives.SOLUTION,
    shapes=lambda m, b, **_: torch.empty_like(b, dtype=torch.promote_types(m.dtype, b.dtype)),
    methods=SOLVE.methods,
    m=2,
    b=2,
    damping=0,
)
def _solve_ex(
    m: Tensor,
    b: Tensor,
    damping: Damping = 0.0,
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> tuple[Tensor, Certificate]:
    """`solve_ex` of matrices in one batch."""
    dtype = torch.promote_types(m.dtype, b.dtype)
    return evaluate(
        SOLVE, m.to(dtype), method=method, rtol=rtol, certify=certify, damping=damping, right=load(b.to(dtype))
    )


def solve_ex(
    m: Inexact[Tensor, ...],
    b: Inexact[Tensor, ...],
    damping: Damping = 0.0,
    *,
    left: bool = True,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> tuple[Inexact[Tensor, ...], Certificate]:
    """`solve` with its certificate, never raising for a matrix's values; NaN where there is no solution.

    Args:
        m, b, damping, left, method, rtol, certify: as for `solve`.
    Returns: the solution and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `solve`.
    Source: as for `solve`.

    >>> value, certificate = solve_ex(torch.eye(2), torch.ones(2, 1), damping=1.0)
    >>> value.tolist(), certificate.converged.item()
    ([[0.5], [0.5]], True)
    """
    check("solve", m, square=True, real=False)
    vector = isinstance(b, Tensor) and (b.ndim == 1 or b.shape == m.shape[:-1])
    right = check("solve", b[..., None] if vector else b, real=False)
    if not left:
        m, right = m.mT, right if vector else right.mT
    batch = broadcast(m.shape[:-2], right.shape[:-2])
    if batch is None or m.shape[-1] != right.shape[-2]:
        raise ShapeError(
            f"solve: expected (..., n, n) and (..., n, k), (..., k, n) if left=False, or (n,) or (..., n), got "
            f"{tuple(m.shape)} and {tuple(b.shape)}. The batch dimensions are broadcast; a vector that is broadcast "
            "too is b[..., None]."
        )
    m, right = m.expand(*batch, *m.shape[-2:]), right.expand(*batch, *right.shape[-2:])
    if m.is_complex() or right.is_complex():
        value, proof = _solve_ex(real_form(m), stacked(right), damping, method=method, rtol=rtol, certify=certify)
        value = unstacked(value)
    else:
        value, proof = _solve_ex(m, right, damping, method=method, rtol=rtol, certify=certify)
    return value[..., 0] if vector else value if left else value.mT, proof


def solve(
    m: Inexact[Tensor, ...],
    b: Inexact[Tensor, ...],
    damping: Damping = 0.0,
    *,
    left: bool = True,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> Inexact[Tensor, ...]:
    """The solution Z of (M + λI) Z = B, or of Z (M + λI) = B if not `left`.

    Z = (M + λI)⁻¹ B, refined against the residual B − (M + λI) Z.

    Args:
        m: `(..., n, n)`.
        b: `(..., n, k)`, `(..., k, n)` if not `left`, or a vector: `(n,)`, or the shape of `m` without its last
            dimension, as for `torch.linalg.solve`. Batches are broadcast.
        damping: λ ≥ 0, absolute, one number or one per matrix.
        left: whether M stands to the left of Z.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error of Z asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: the solution, of the shape of `b` with the batch of both, in the wider dtype of `m` and `b`.
    Raises:
        ShapeError: where `m` is not square, or `b` or `damping` does not fit it.
        DtypeError: where `m` or `b` is not floating point, real or complex.
        InputError: for an unknown method, or a negative damping or rtol.
        ConvergenceError: where a matrix is singular, or its error bound is above rtol.
    Cost: one inverse, which the bound needs, in float32 (float64 if M is float64), and O(n²k) of float64 refinement.
    Accuracy: one rounding of the dtype, until κ of the equilibrated matrix nears 1e20. The certificate's
    residual is ‖B − MZ‖_F / ‖B‖_F.
    Source: Rump, Acta Numerica 19 (2010), §10.

    >>> solve(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[2.0], [2.0]]))
    tensor([[1.0000],
            [0.5000]])
    """
    value, certificate = solve_ex(m, b, damping, left=left, method=method, rtol=rtol, certify=certify)
    require_converged("solve", certificate)
    return value
