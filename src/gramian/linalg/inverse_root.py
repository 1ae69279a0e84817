"""The inverse p-th root of symmetric positive definite matrices, certified with products by a few random vectors."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Inexact
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, require_converged
from gramian.linalg.engine import lapack
from gramian.linalg.engine.backward_error import Rows, tightened
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import (
    Pair,
    damped,
    eye_like,
    minus,
    pair,
    plus,
    power,
    product,
    symmetric,
)
from gramian.linalg.engine.eigenvalue_ratio import hopeless
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.function import MatrixFunction, evaluate, register
from gramian.linalg.engine.loading import Damping
from gramian.linalg.engine.probes import EXACT, probes
from gramian.linalg.engine.real_form import takes_complex
from gramian.linalg.engine.rounding import chain_rounding, gamma, norm, unit_roundoff
from gramian.linalg.engine.spectrum import Spectrum
from gramian.linalg.engine.symmetric_eigen import decompose
from gramian.linalg.engine.workspace import scratch
from gramian.linalg.inverse_root_bound import fine, from_eigenpairs, of_roots, root_bound, root_of, wide
from gramian.linalg.principal_inverse_root import principal_inverse_root_ex

__all__ = ["inv_root", "inv_root_ex"]

EIGH32_ERROR = 4 * 2.0**-24
"""What a float32 eigendecomposition loses, as relative error times p over κ at least; observed."""

STEPS = 60
"""Most steps of the coupled iteration: at first each gains (1 + 1/p) on κ^(1/p), in the end each doubles the digits."""

REFINEMENTS = 2
"""Corrections of `_eigh_refined`."""


def _eigh32(
    x: Tensor, *, shift: Tensor, p: int, dtype: torch.dtype, rtol: float, certify: bool = True
) -> Answer | None:
    """V w^(-1/p) Vᵀ by an eigendecomposition in float32; error εκ/p."""
    narrow = scratch("narrow", tuple(x.shape), torch.float32, x).copy_(x)
    narrow.diagonal(dim1=-2, dim2=-1).add_(shift.float()[:, None])
    if hopeless(narrow, rtol * p, EIGH32_ERROR):
        return None
    w, v, ok = lapack.eigh(narrow)
    if not certify:
        reason = torch.where(ok & (w > 0).all(-1), cert.NONE, cert.INACCURATE)
        root = root_of(w.double(), p)
        return Answer.bare(of_roots(root, v, v.dtype), reason, spectrum=Spectrum(root, v))
    value, error, residual = from_eigenpairs(damped(x, shift), w.double(), v, p, v.dtype, rtol, dtype)
    proven = ok & error.isfinite() & (w > 0).all(-1)
    reason = torch.where(proven, cert.NONE, cert.INACCURATE)
    error = torch.where(proven, error, math.inf)
    spectrum = Spectrum(root_of(w.double(), p), v)
    return Answer(value, error, residual, reason, failure=6 * probes(x.shape[-1], x.device).failure, spectrum=spectrum)


def _eigh64(x: Tensor, *, shift: Tensor, p: int, dtype: torch.dtype, rtol: float, certify: bool = True) -> Answer:
    """The same in float64, with V w^(-1/p) Vᵀ multiplied in float32 unless M is float64; error uκ/p and one rounding.

    Where a positive definite M is not proven the value is the root of the inverse on the range.
    """
    m = damped(x, shift)
    w, v, floor, reason = decompose(m, dtype)
    kept = w > floor
    if not certify:
        reason = torch.where((reason == cert.NONE) & ~kept.all(-1), cert.SINGULAR, reason)
        root = torch.where(kept, root_of(w, p), 0.0)
        return Answer.bare(of_roots(root, v, wide(dtype)), reason, spectrum=Spectrum(root_of(w, p), v))
    small, positive = 0 < x.shape[-1] <= EXACT, (w > 0).all(-1)
    value, error, residual = from_eigenpairs(m, w, v, p, torch.float64 if small else wide(dtype), rtol, dtype)
    error = torch.where(positive, error, math.inf)
    if small:
        # Residuals in float64 are rounding; the correction that double-double ones give is the error itself.
        def finer(rows: Rows) -> tuple[Tensor, Tensor]:
            some, own, root = Pair(*(y[rows] for y in m)), value[rows], root_of(w[rows], p)
            further = _corrected(some, pair(own), root, v[rows], p, 1)
            rest, _ = _pair_bound(some, further, root, w[rows], p)
            return torch.fmin(error[rows], norm(further.hi - own) + norm(further.lo) + rest), residual[rows]

        error, residual = tightened(lambda: (error, residual), finer, norm(value), dtype)
    proven = error.isfinite()
    unproven = torch.where(kept.all(-1), cert.INACCURATE, cert.SINGULAR)
    reason = torch.where((reason == cert.NONE) & ~proven, unproven, reason)
    if not bool(proven.all()):
        root = torch.where(kept, w, torch.inf) ** (-1 / p)
        on_range = ((v * root[:, None, :]) @ v.mT).to(value.dtype)
        value = torch.where(proven[:, None, None], value, on_range)
    spectrum = Spectrum(root_of(w, p), v)
    return Answer(value, error, residual, reason, failure=6 * probes(x.shape[-1], x.device).failure, spectrum=spectrum)


def _coupled_newton(
    x: Tensor, *, shift: Tensor, p: int, dtype: torch.dtype, rtol: float, certify: bool = True
) -> Answer:
    """X ← XT, M ← TᵖM with T = ((p + 1)I − M)/p, products only, in float32 (float64 for a float64 M). Iannazzo 2006.

    For devices on which an eigendecomposition is slow. Positive definiteness comes from a Cholesky factor of X.
    """
    n = x.shape[-1]
    m = damped(x, shift)
    work = wide(dtype)
    eye = torch.eye(n, dtype=work, device=x.device)
    start = (1 + p) / (2 * norm(m.hi).clamp_min(2.0**-500))
    y = (m.hi * start[:, None, None]).to(work)
    z = eye * (start ** (1 / p)).to(work)[:, None, None]
    least = torch.full_like(start, math.inf)
    best, steps = z, 0
    for step in range(STEPS if x.numel() else 0):
        t = (eye * (p + 1) - y) / p
        y, z = power(t, p, torch.matmul) @ y, z @ t
        gap = norm(y - eye)
        # Rounding makes the iteration diverge again once it has reached its limiting accuracy: keep the best.
        better = gap < least
        best, least = torch.where(better[:, None, None], z, best), torch.where(better, gap, least)
        steps = step + 1
        if step % 4 == 3 and not bool((better & (gap > 1e-3 * unit_roundoff(work))).any()):
            break
    value = (best + best.mT) / 2
    if not certify:
        failed = ~(least < 0.5) & bool(n)
        return Answer.bare(value, torch.where(failed, cert.INACCURATE, cert.NONE), steps)
    lower, info = lapack.cholesky(value)
    lower = torch.where((info != 0)[:, None, None], eye, lower).double()
    top = norm(lower) ** 2

    def times(z: Tensor) -> Tensor:
        return lower @ (lower.mT @ z)

    slip = 2 * chain_rounding(n + 2, norm(lower), top.sqrt())
    error, residual = root_bound(m, value, times, top, slip, p, probes(n, x.device), fine, near=True)
    proven = (info == 0) & error.isfinite()
    reason = torch.where(proven, cert.NONE, cert.INACCURATE)
    error = torch.where(proven, error, math.inf)
    return Answer(value, error, residual, reason, steps, failure=6 * probes(n, x.device).failure)


def _eigh_refined(x: Tensor, *, shift: Tensor, p: int, dtype: torch.dtype, rtol: float, certify: bool = True) -> Answer:
    """V w^(-1/p) Vᵀ, then two first-order corrections from double-double residuals; right to the last bits while
    uκ < 1.
    """
    m = damped(x, shift)
    w, v, floor, reason = decompose(m, dtype)
    root = root_of(w, p)
    value = symmetric(pair((v * root[:, None, :]) @ v.mT))
    value = _corrected(m, pair(value.hi), root, v, p, REFINEMENTS)
    kept = w > floor
    on_range = (v * (root * kept)[:, None, :]) @ v.mT
    if not certify:
        lost = ~kept.all(-1)
        reason = torch.where((reason == cert.NONE) & lost, cert.SINGULAR, reason)
        return Answer.bare(torch.where(lost[:, None, None], on_range, value.hi), reason, REFINEMENTS)
    error, residual = _pair_bound(m, value, root, w, p)
    proven = error.isfinite()
    unproven = torch.where(kept.all(-1), cert.INACCURATE, cert.SINGULAR)
    reason = torch.where((reason == cert.NONE) & ~proven, unproven, reason)
    error = error + norm(value.lo)
    return Answer(torch.where(proven[:, None, None], value.hi, on_range), error, residual, reason, REFINEMENTS)


def _corrected(m: Pair, value: Pair, root: Tensor, v: Tensor, p: int, steps: int) -> Pair:
    """X after `steps` first-order corrections from double-double residuals R = I − XᵖM.

    In the eigenbasis the correction is R_ij x_jᵖ / Σ_k x_iᵏ x_j^(p−1−k), the divided difference of λ^(-1/p) without its
    cancellation (Higham, Functions of Matrices, theorem 3.11).
    """
    row, column = root[:, :, None], root[:, None, :]
    ratio = torch.where(row > 0, column / row, 0.0)
    # Divided by x_iᵖ⁻¹ throughout, so that no power overflows.
    weights = row * ratio**p / sum(ratio ** (p - 1 - k) for k in range(p))
    for _ in range(steps):
        r, _ = minus(eye_like(v), product(power(value, p, product), m))
        # Eigenvalues ascend: above the diagonal lie the large entries of R, below it their rounding.
        d = ((v.mT @ r @ v) * weights).triu()
        d = v @ (d + d.triu(1).mT) @ v.mT
        value = plus(value, (d + d.mT) / 2)
    return value


def _pair_bound(m: Pair, value: Pair, root: Tensor, w: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """A bound on ‖X − M^(-1/p)‖_F for a pair X, inf where none is proven, as of `root_bound`; and ‖I − XᵖM‖_F."""
    r, r_error = minus(eye_like(value.hi), product(power(value, p, product), m))
    size = norm(r) + r_error
    n = root.shape[-1]
    largest = root.amax(-1) if n else root.new_zeros(root.shape[0])
    smallest = root.amin(-1) if n else root.new_ones(root.shape[0])
    positive = smallest / 2 > 8 * gamma(n + 8) * math.sqrt(max(n, 1)) * largest
    proven = (size < 1) & positive & (w > 0).all(-1)
    relative = torch.expm1(torch.log1p(-size.clamp_max(0.999)) / -p)
    return torch.where(proven, relative * (norm(value.hi) + norm(value.lo)), math.inf), norm(r)


def _plain(m: Tensor, p: int) -> Tensor:
    w, v = torch.linalg.eigh(m)
    return (v * w[..., None, :] ** (-1 / p)) @ v.mT


INV_ROOT = register(
    MatrixFunction(
        "inv_root",
        {
            "coupled_newton": Method(
                _coupled_newton,
                torch.float64,
                1e-4,
                lambda m, n: {"float32": 92, "thin64": 18},
                "products only, for devices where eigh is slow",
                narrow=True,
            ),
            "eigh32": Method(
                _eigh32,
                torch.float64,
                1e-5,
                lambda m, n: {"eigh32": 1, "cholesky32": 2, "float32": 0.8, "thin64": 7},
                "κ ≤ 1e3 at 1e-4, 1e4 at 1e-2",
                narrow=True,
                spectral=True,
            ),
            "eigh64": Method(
                _eigh64,
                torch.float64,
                1e-12,
                lambda m, n: {"eigh64": 1, "float32": 0.8, "thin64": 6},
                "κ ≤ 1e12",
                spectral=True,
            ),
            "eigh_refined": Method(
                _eigh_refined,
                torch.float64,
                0.0,
                lambda m, n: {"eigh64": 1, "float64": 40},
                "κ to 1e13",
            ),
        },
        "definite",
        lambda p: Fraction(-1, p),
        plain=_plain,
        exact=lambda mp, w, p: mp.power(w, -mp.mpf(1) / p),
        examples={"inv_root_2": lambda a: {"p": 2}, "inv_root_4": lambda a: {"p": 4}},
        damped=True,
    )
)


@takes_complex("inv_root", square=True)
@differentiable(
    derivatives.INVERSE_ROOT,
    shapes=lambda m, **_: torch.empty_like(m),
    methods=INV_ROOT.methods,
    spectral=True,
    m=2,
    damping=0,
)
def _inv_root_ex(
    m: Tensor, p: int, damping: Damping = 0.0, *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Tensor, Certificate]:
    """`inv_root_ex` of symmetric matrices."""
    return evaluate(INV_ROOT, m, method=method, rtol=rtol, certify=certify, damping=damping, p=p)


def inv_root_ex(
    m: Inexact[Tensor, "*b n n"],
    p: int,
    damping: Damping = 0.0,
    *,
    symmetric: bool = True,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> tuple[Inexact[Tensor, "*b n n"], Certificate]:
    """`inv_root` with its certificate, never raising for a matrix's values.

    Where M + λI is rank-deficient the value is the root of the inverse on its range, and not converged.

    Args:
        m, p, damping, symmetric, method, rtol, certify: as for `inv_root`.
    Returns: the inverse root and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `inv_root`.
    Source: as for `inv_root`.

    >>> value, certificate = inv_root_ex(torch.diag(torch.tensor([16.0, 0.0])), 4)
    >>> value.tolist(), certificate.converged.item()
    ([[0.5, 0.0], [0.0, 0.0]], False)
    """
    if isinstance(p, bool) or not isinstance(p, int) or p < 1:
        raise InputError(f"inv_root: expected an integer p ≥ 1, got {p!r}. Use p=2 or p=4, for M^(-1/2) or M^(-1/4).")
    function = _inv_root_ex if symmetric else principal_inverse_root_ex
    return function(m, p, damping, method=method, rtol=rtol, certify=certify)


def inv_root(
    m: Inexact[Tensor, "*b n n"],
    p: int,
    damping: Damping = 0.0,
    *,
    symmetric: bool = True,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> Inexact[Tensor, "*b n n"]:
    """The inverse p-th root of a symmetric positive definite matrix, or the principal one of a square matrix.

    inv_root(M, p, λ) = (M + λI)^(-1/p), if not `symmetric` with eigenvalues whose arguments are between −π/p and π/p.

    Args:
        m: `(..., n, n)`, symmetric up to 10·n·ε(dtype), or Hermitian; if not `symmetric`, without eigenvalues at zero
            or on the negative real axis.
        p: an integer ≥ 1.
        damping: λ ≥ 0, absolute, one number or one per matrix; 0 for p > 2 if not `symmetric`.
        symmetric: whether M is, and what is not is refused. If False, M may be any matrix with a principal root.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., n, n)`, the inverse root, in the dtype of `m`.
    Raises:
        ShapeError: where `m` is not square, or `damping` does not fit it.
        DtypeError: where `m` is not floating point, real or complex.
        InputError: for an unknown method, a p that is not an integer ≥ 1, or a negative damping or rtol.
        ConvergenceError: where M + λI is not symmetric, has an eigenvalue that is not positive, or the error bound is
            above rtol.
    Cost: in float32 products at 1024²: an eigendecomposition, 7 in float32 or 13 in float64, and about 3; refined, 100.
    "coupled_newton" about 90, products only. Accuracy: what `rtol` asks for, until κ nears 1e13. The certificate's
    residual is a bound on ‖XᵇMXᵃ − I‖_F, a + b = p. If not `symmetric`, a square root and an inverse, or a logarithm
    and an exponential, whose errors are composed; the residual is that of the last.
    Source: Higham, Functions of Matrices (2008), chapter 7 and theorem 3.11.

    >>> inv_root(torch.diag(torch.tensor([16.0, 1.0])), 4)
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    value, certificate = inv_root_ex(m, p, damping, symmetric=symmetric, method=method, rtol=rtol, certify=certify)
    require_converged("inv_root", certificate)
    return value
