"""The inverse, and the solution of linear systems, with certificates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError, ShapeError
from gramian.linalg import certificate as cert
from gramian.linalg import factor
from gramian.linalg.batch import Answer, Route, check, choose, climb, declined, ladder, load, norm, scale
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.conditioning import eigenvalue_ratio
from gramian.linalg.probes import Probes, apply, chain_rounding, of_norm, probes
from gramian.linalg.twofold import Pair, eye_like, gamma, minus, pair, plus, product, rough, rounding, two_sum

Damping = float | int | Tensor
Product = Callable[[Pair, Pair], Pair]

LOSS = 2.0**-24
"""Bound on the relative error over κ, that a float32 Cholesky inverse costs; observed."""


def damping_of(name: str, damping: Damping, m: Tensor) -> Tensor:
    """`damping` as a flat (B,) float64 tensor; one number, or one per matrix."""
    if not isinstance(damping, Tensor) and not (damping >= 0 and math.isfinite(damping)):
        raise InputError(f"{name}: expected damping ≥ 0 and finite, got {damping}.")
    value = torch.as_tensor(damping, dtype=torch.float64, device=m.device)
    try:
        return value.expand(m.shape[:-2]).reshape(-1)
    except RuntimeError as e:
        raise ShapeError(
            f"{name}: expected damping to be one number or of shape {tuple(m.shape[:-2])}, got {tuple(value.shape)}."
        ) from e


def damped(x: Tensor, shift: Tensor) -> Pair:
    """x + shift·I as a pair: the sum is rounded, and the pair knows by how much."""
    if x.device.type == "cpu" and not bool(shift.any()):
        return pair(x)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return Pair(*two_sum(x, shift[:, None, None] * eye), x.new_zeros(x.shape[0]))


def _lu(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse by LU, zero where a pivot is zero, and where that is."""
    y, info = factor.inverse(x)
    bad = (info != 0) | ~y.isfinite().flatten(1).all(1)
    return torch.where(bad[:, None, None], 0.0, y), bad


def _cholesky(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse by Cholesky of the lower triangle, zero where a pivot is not positive, and where that is."""
    factor, info = torch.linalg.cholesky_ex(x)
    bad = info != 0
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    y = torch.cholesky_inverse(torch.where(bad[:, None, None], eye, factor))
    return torch.where(bad[:, None, None], 0.0, y), bad


def _route(invert: Callable[[Tensor], tuple[Tensor, Tensor]], work: torch.dtype) -> Callable[..., Answer]:
    """The route that inverts in `work`, or gives up where that finds no inverse."""

    def run(x: Tensor, shift: Tensor, *, decline: float) -> Answer:
        m = damped(x, shift)
        narrow = m.hi.to(work)
        if work == torch.float32 and math.isfinite(decline) and invert is _cholesky:
            hopeless = decline * eigenvalue_ratio(narrow) < LOSS
            if bool(hopeless.all()):
                return declined(narrow)
        y, bad = invert(narrow)
        error, residual = inverse_bound(m, y, probes(x.shape[-1], x.device), twofold=work == torch.float64)
        error = torch.where(bad, math.inf, error)
        proven = error.isfinite()
        # Whether a matrix is singular, only the last resort says.
        reason = torch.where(proven, cert.NONE, cert.INACCURATE)
        return Answer(y, error, residual, reason, failure=2 * probes(x.shape[-1], x.device).failure)

    return run


def inverse_bound(m: Pair, y: Tensor, p: Probes, *, twofold: bool) -> tuple[Tensor, Tensor]:
    """A bound on ‖M⁻¹ − Y‖_F, and on ‖R‖_F, R = I − MY: as M⁻¹ = Y(I − R)⁻¹, it is ‖YR‖_F / (1 − ‖R‖)."""
    if not y[0:1].numel():
        zero = torch.zeros(y.shape[0], dtype=torch.float64, device=y.device)
        return zero, zero
    n = y.shape[-1]
    omega = p.omega.expand(y.shape[0], -1, -1)
    size = norm(y)
    right = apply(y, omega)
    image = (product if twofold else rough)(m, pair(right))
    gap, gap_error = minus(pair(omega), image)
    gap_error = gap_error + chain_rounding(n, norm(m.hi) + norm(m.lo), size, norm(omega))
    r = of_norm(gap, p, gap_error)
    error = of_norm(apply(y, gap), p, size * gap_error + chain_rounding(n, size, norm(gap))) / (1 - r)
    return torch.where((r < 0.5) & error.isfinite(), error, math.inf), r


def lu_refined(x: Tensor, shift: Tensor, *, decline: float) -> Answer:
    """By LU and Newton–Schulz steps Y ← Y + Y(I − MY) on twofold residuals, which converge for uκ < 1."""
    m = damped(x, shift)
    y, bad = _lu(m.hi)
    close, steps = pair(y), 3
    for _ in range(steps):
        r, _ = minus(eye_like(x), product(m, close))
        # Not a contraction: a step would make it worse, and the certificate will say so.
        r = torch.where((norm(r) < 1)[:, None, None], r, 0.0)
        close = plus(close, close.hi @ r)
    return _certified(m, close, bad, product, cert.SINGULAR, steps)


# Below an rtol of 2e-6 the bounds of all but the refined routes are more than 100 times the error, as they take
# rounding at its worst: they are not tried.
INV: dict[str, Route] = {
    "cholesky32": Route(
        _route(_cholesky, torch.float32),
        torch.float64,
        1e-5,
        lambda m, n: {"cholesky32": 4, "thin64": 4, "float32": 0.2},
        narrow=True,
    ),
    "lu32": Route(
        _route(_lu, torch.float32), torch.float64, 1e-5, lambda m, n: {"inverse32": 1, "thin64": 4}, narrow=True
    ),
    "cholesky": Route(
        _route(_cholesky, torch.float64), torch.float64, 2e-6, lambda m, n: {"cholesky64": 3.2, "thin64": 14}
    ),
    "lu": Route(_route(_lu, torch.float64), torch.float64, 2e-6, lambda m, n: {"inverse64": 1, "thin64": 14}),
    "lu_refined": Route(lu_refined, torch.float64, 0.0, lambda m, n: {"inverse64": 1, "float64": 40}),
}


def _certified(m: Pair, y: Pair, bad: Tensor, times: Product, otherwise: int, steps: int) -> Answer:
    """M⁻¹ = Y(I − R)⁻¹ with R = I − MY, so ‖M⁻¹ − Y‖_F ≤ ‖YR‖_F + ‖YR‖_F‖R‖/(1 − ‖R‖)."""
    r, r_error = minus(eye_like(y.hi), times(m, y))
    size = norm(r) + r_error
    # ‖Y‖ times the rounding of R, but row by row: graded matrices have their large rows of Y at small ones of M.
    spread = rounding(m, y, twofold=times is product)
    blur = sum(
        ((y.hi.abs() @ row[..., None]).norm(dim=(1, 2)) * column.norm(dim=1) for row, column in spread), size * 0
    )
    step = norm(y.hi @ r) + blur + norm(y.hi) * gamma(y.hi.shape[-1] + 3) * norm(r) + norm(y.lo) * size
    step = step * (1 + 2.0**-20)
    proven = (size < 1) & ~bad
    error = torch.where(proven, step / (1 - size) + norm(y.lo), math.inf)
    reason = torch.where(bad, cert.SINGULAR, torch.where(proven, cert.NONE, otherwise))
    value = torch.where((reason == cert.SINGULAR)[:, None, None], math.nan, y.hi)
    return Answer(value, error, norm(r), reason, steps)


@torch.no_grad()
def inv_ex(
    m: Float[Tensor, "*b n n"], damping: Damping = 0.0, *, method: str = "auto", rtol: float | None = None
) -> tuple[Float[Tensor, "*b n n"], Certificate]:
    """`inv` with its certificate, never raising for a matrix's values; NaN where there is no inverse.

    >>> value, certificate = inv_ex(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    >>> value.diagonal().tolist(), certificate.converged.item(), certificate.method_names
    ([0.5, 0.25], True, ['lu'])
    """
    check("inv", m, square=True)
    choose("inv", method, INV)
    shift = damping_of("inv", damping, m)
    batch = load(m, at_least=shift)
    tolerance = default_rtol(rtol, m.dtype)
    # Cholesky reads one triangle: it is only for matrices that are symmetric to the last bit.
    symmetric = m.device.type != "cpu" or torch.equal(m, m.mT)
    family = {name: row for name, row in INV.items() if symmetric or not name.startswith("cholesky")}
    names = [method] if method != "auto" else ladder(family, m.shape, tolerance, m.device.type)
    return climb(batch, INV, names, tolerance, torch.neg, shift=scale(shift, -batch.exponent))


def inv(
    m: Float[Tensor, "*b n n"], damping: Damping = 0.0, *, method: str = "auto", rtol: float | None = None
) -> Float[Tensor, "*b n n"]:
    """The inverse of M + λI.

    inv(M, λ) = (M + λI)⁻¹.

    Arguments: `m` (..., n, n); `damping` λ ≥ 0, absolute, one number or one per matrix; `method`, one of `INV` or
    "auto"; `rtol`, the relative Frobenius error asked for (`certificate.RTOL` of the dtype if None).
    Raises: `ShapeError`, `DtypeError`; `ConvergenceError` where a matrix is singular or its error bound is above rtol.
    Cost in float32 products at 1024²: 4 by Cholesky, or by LU where M is not symmetric, while κ allows; 6 in float64;
    30 more to refine (float64). Accuracy: what `rtol` asks for, until κ nears 1e15; the residual is a bound on
    ‖I − MY‖_F.
    Source: Higham, Accuracy and Stability (2002), §14.1; Rump, Acta Numerica 19 (2010), §10.

    >>> inv(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), damping=1.0)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    value, certificate = inv_ex(m, damping, method=method, rtol=rtol)
    require_converged("inv", certificate)
    return value


def _solver(
    invert: Callable[[Tensor], tuple[Tensor, Tensor]], work: torch.dtype, times: Product, steps: int
) -> Callable[..., Answer]:
    """Y ≈ M⁻¹ in `work`, then z ← z + Y(b − Mz). As I − YM = L, ‖M⁻¹b − z‖_F ≤ ‖Y(b − Mz)‖_F / (1 − ‖L‖)."""

    def run(x: Tensor, shift: Tensor, b: Tensor, *, decline: float) -> Answer:
        m, right = damped(x, shift), pair(b)
        p = probes(x.shape[-1], x.device)
        y, bad = invert(m.hi.to(work))
        z = pair(apply(y, b)) if y[0:1].numel() else pair(b)
        for _ in range(steps if y[0:1].numel() else 0):
            r, _ = minus(right, times(m, z))
            z = plus(z, apply(y, r))
        size = _left_defect(m, y, p, times)
        r, r_error = minus(right, times(m, z))
        step = norm(y.double() @ r) + norm(y) * (r_error + gamma(x.shape[-1] + 1) * norm(r))
        zero = norm(b) == 0
        proven = (size < 1) & ~bad
        error = torch.where(zero, 0.0, step / (1 - size) + norm(z.lo))
        error = torch.where(proven, error, math.inf)
        last = times is product
        reason = torch.where(bad, cert.SINGULAR if last else cert.INACCURATE, cert.NONE)
        reason = torch.where(proven | bad, reason, cert.INACCURATE)
        value = torch.where(bad[:, None, None], math.nan, z.hi)
        return Answer(value, error, norm(r) / norm(b).clamp_min(2.0**-1000), reason, steps, p.failure)

    return run


def _left_defect(m: Pair, y: Tensor, p: Probes, times: Product) -> Tensor:
    """A bound on ‖I − YM‖_F."""
    if not y[0:1].numel():
        return torch.zeros(y.shape[0], dtype=torch.float64, device=y.device)
    n = y.shape[-1]
    omega = p.omega.expand(y.shape[0], -1, -1)
    image = times(m, pair(omega))
    left, left_error = minus(pair(omega), times(pair(y.double()), image))
    return of_norm(left, p, left_error + chain_rounding(n, norm(y), norm(image.hi)))


SOLVE: dict[str, Route] = {
    "cholesky32": Route(
        _solver(_cholesky, torch.float32, rough, steps=3),
        torch.float64,
        2e-6,
        lambda m, n: {"cholesky32": 4, "thin64": 14},
        narrow=True,
    ),
    "lu32": Route(
        _solver(_lu, torch.float32, rough, steps=3),
        torch.float64,
        2e-6,
        lambda m, n: {"inverse32": 1, "thin64": 14},
        narrow=True,
    ),
    "lu": Route(
        _solver(_lu, torch.float64, rough, steps=1), torch.float64, 2e-6, lambda m, n: {"inverse64": 1, "thin64": 18}
    ),
    "lu_refined": Route(
        _solver(_lu, torch.float64, product, steps=4), torch.float64, 0.0, lambda m, n: {"inverse64": 1, "thin64": 40}
    ),
}


@torch.no_grad()
def solve_ex(
    m: Float[Tensor, "*b n n"],
    b: Float[Tensor, "*b n k"],
    damping: Damping = 0.0,
    *,
    method: str = "auto",
    rtol: float | None = None,
) -> tuple[Float[Tensor, "*b n k"], Certificate]:
    """`solve` with its certificate, never raising for a matrix's values; NaN where there is no solution.

    >>> value, certificate = solve_ex(torch.eye(2), torch.ones(2, 1), damping=1.0)
    >>> value.tolist(), certificate.converged.item()
    ([[0.5], [0.5]], True)
    """
    check("solve", m, square=True)
    check("solve", b)
    choose("solve", method, SOLVE)
    if m.shape[-1] != b.shape[-2] or m.shape[:-2] != b.shape[:-2]:
        raise ShapeError(
            f"solve: expected (..., n, n) and (..., n, k), got {tuple(m.shape)} and {tuple(b.shape)}. "
            "Expand the batch dimensions, and write a vector as b[..., None]."
        )
    dtype = torch.promote_types(m.dtype, b.dtype)
    shift = damping_of("solve", damping, m)
    batch, right = load(m.to(dtype), at_least=shift), load(b.to(dtype))
    joint = replace(batch, exponent=right.exponent - batch.exponent, finite=batch.finite & right.finite)
    tolerance = default_rtol(rtol, dtype)
    symmetric = m.device.type != "cpu" or torch.equal(m, m.mT)
    family = {name: row for name, row in SOLVE.items() if symmetric or not name.startswith("cholesky")}
    names = [method] if method != "auto" else ladder(family, m.shape, tolerance, m.device.type)
    scaled = scale(shift, -batch.exponent)
    return climb(joint, SOLVE, names, tolerance, torch.clone, shift=scaled, b=right.x)


def solve(
    m: Float[Tensor, "*b n n"],
    b: Float[Tensor, "*b n k"],
    damping: Damping = 0.0,
    *,
    method: str = "auto",
    rtol: float | None = None,
) -> Float[Tensor, "*b n k"]:
    """The solution Z of (M + λI) Z = B.

    Arguments: `m` (..., n, n); `b` (..., n, k), a vector being (n, 1); `damping` λ ≥ 0, absolute, one number or one
    per matrix; `method`, one of `SOLVE` or "auto"; `rtol`, the relative Frobenius error of Z asked for
    (`certificate.RTOL` of the dtype if None).
    Raises: `ShapeError`, `DtypeError`; `ConvergenceError` where a matrix is singular or its error bound is above rtol.
    Cost: one inverse, which the bound needs, in float32 (float64 if M came so) and O(n²k) of float64 refinement.
    Accuracy: one rounding of the dtype, until κ nears 1e14; the residual is ‖B − MZ‖_F / ‖B‖_F.
    Source: Rump, Acta Numerica 19 (2010), §10.

    >>> solve(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[2.0], [2.0]]))
    tensor([[1.0000],
            [0.5000]])
    """
    value, certificate = solve_ex(m, b, damping, method=method, rtol=rtol)
    require_converged("solve", certificate)
    return value
