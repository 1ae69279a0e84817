"""Denoising by optimal shrinkage of singular values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError, ShapeError
from gramian.linalg import certificate as cert
from gramian.linalg import singular_derivatives
from gramian.linalg.certificate import Certificate, default_rtol, require_converged, uncertified, verdict
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import eye_like, minus, pair, rough, transpose
from gramian.linalg.engine.loading import check, choose, load
from gramian.linalg.engine.rounding import U, norm
from gramian.linalg.engine.scaling import scale


def _root(y: Tensor, beta: float) -> Tensor:
    return ((y**2 - beta - 1) ** 2 - 4 * beta).clamp_min(0).sqrt()


def _signal(y: Tensor, beta: float) -> Tensor:
    """ℓ(y), the singular value of the signal that noise turns into y. Gavish and Donoho, arXiv:1405.7511."""
    return ((y**2 - beta - 1 + _root(y, beta)) / 2).clamp_min(0).sqrt()


def _frobenius(y: Tensor, beta: float) -> Tensor:
    return _root(y, beta) / y


def _nuclear(y: Tensor, beta: float) -> Tensor:
    x = _signal(y, beta)
    return ((x**4 - beta - math.sqrt(beta) * x * y) / (x**2 * y)).clamp_min(0)


SHRINK: dict[str, Callable[[Tensor, float], Tensor]] = {
    "frobenius": _frobenius,
    "operator": _signal,
    "nuclear": _nuclear,
}
"""Optimal shrinkers for each loss, of y in units of σ√n, above the edge 1 + √β. Gavish and Donoho, arXiv:1405.7511."""


def shrink(s: Tensor, noise: Tensor, n: int, beta: float, loss: str) -> Tensor:
    """η(s) for singular values s (B, k) of matrices whose longer side is n and noise level is `noise` (B,)."""
    unit = (noise * math.sqrt(n))[..., None]
    y = s / torch.where(unit > 0, unit, 1.0)
    above = y > 1 + math.sqrt(beta)
    eta = torch.where(above, SHRINK[loss](torch.where(above, y, 2 + math.sqrt(beta)), beta), 0.0)
    return torch.where(unit > 0, eta * unit, s)


def marchenko_pastur_median(beta: float) -> float:
    """The median of the Marchenko–Pastur law of ratio β ≤ 1, by quadrature: x = 1 + β + 2√β cos θ.

    >>> round(marchenko_pastur_median(1.0), 4)
    0.6528
    """
    steps = 20_000
    theta = (torch.arange(steps, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / steps)
    x = 1 + beta + 2 * math.sqrt(beta) * theta.cos()
    mass = 2 * theta.sin() ** 2 / (math.pi * x) * (math.pi / steps)
    below = mass.cumsum(0)
    i = int((below < below[-1] / 2).sum())
    part = float((below[i] - below[-1] / 2) / mass[i])
    return 1 + beta + 2 * math.sqrt(beta) * math.cos((i + 1 - part) * math.pi / steps)


def _slope(s: Tensor, eta: Callable[[Tensor], Tensor], width: Tensor) -> Tensor:
    """The largest divided difference of the odd continuation of η over the singular values: the Lipschitz constant.

    Noferini, SIAM J. Matrix Anal. Appl. 38 (2017), with differences over `width` for derivatives, so that
    a jump within width counts.
    """
    wide = width[:, None].expand_as(s).clamp_min(1e-7 * s.amax(-1, keepdim=True) if s.shape[-1] else 0.0)
    points = torch.cat([s, (s - wide).abs(), s + wide], -1)
    f = eta(points)
    gap = (points[:, :, None] - points[:, None, :]).abs()
    differences = (f[:, :, None] - f[:, None, :]).abs() / torch.where(gap > 0, gap, math.inf)
    sums = (f[:, :, None] + f[:, None, :]) / (points[:, :, None] + points[:, None, :]).clamp_min(2.0**-1000)
    both = torch.maximum(differences, sums).flatten(1)
    return both.amax(1) if both.shape[1] else width * 0


SVD_SHRINK = ("svd",)


def estimated_noise(s: Tensor, n: int, beta: float) -> Tensor:
    """σ of matrices whose singular values s (..., k) are mostly noise. Gavish and Donoho, arXiv:1305.5870, eq. 4."""
    return s.median(-1).values / math.sqrt(n * marchenko_pastur_median(beta)) if s.shape[-1] else s.sum(-1)


@differentiable(
    singular_derivatives.shrinkage(shrink, estimated_noise),
    shapes=lambda a, **_: torch.empty_like(a),
    methods=SVD_SHRINK,
    a=2,
    noise=0,
)
def svd_shrink_ex(
    a: Float[Tensor, "*b m n"],
    noise: float | Tensor | None = None,
    *,
    loss: str = "frobenius",
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> tuple[Float[Tensor, "*b m n"], Certificate]:
    """`svd_shrink` with its certificate, never raising for a matrix's values.

    Args:
        a: `(..., m, n)`.
        noise: σ ≥ 0, one number or one for each matrix; estimated if None.
        loss: "frobenius", "operator" or "nuclear".
        method: one of `SVD_SHRINK` or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the same value, and only seen failures raise.
    Returns: the matrices `(..., m, n)`, and their certificate; its residual is ‖A − UΣVᵀ‖_F / ‖A‖_F.
    Raises: `ShapeError`, `DtypeError`, `InputError`.
    Cost: as `svd_shrink`.
    Source: Gavish and Donoho, arXiv:1405.7511.

    >>> value, certificate = svd_shrink_ex(torch.diag(torch.tensor([9.0, 0.1])), noise=0.1)
    >>> (value[0, 0] < 9).item(), value[1, 1].item(), certificate.converged.item()
    (True, 0.0, True)
    """
    name = "svd_shrink"
    check(name, a)
    choose(name, method, dict.fromkeys(SVD_SHRINK))
    if loss not in SHRINK:
        raise InputError(f"{name}: unknown loss {loss!r}. Use one of: {', '.join(SHRINK)}.")
    batch = load(a)
    k, n = sorted(a.shape[-2:])
    beta = k / n if n else 1.0
    u, s, v, ok = lapack.svd(batch.x)
    if noise is None:
        level = estimated_noise(s, n, beta)
    else:
        given = torch.as_tensor(noise, dtype=torch.float64, device=a.device)
        if not bool((given.isfinite() & (given >= 0)).all()):
            raise InputError(f"{name}: expected noise ≥ 0 and finite, got {noise}. Leave it out to estimate it.")
        try:
            level = scale(given.expand(batch.shape).reshape(-1), -batch.exponent)
        except RuntimeError as e:
            raise ShapeError(
                f"{name}: expected noise to be one number or of shape {tuple(batch.shape)}, got {tuple(given.shape)}."
            ) from e

    def eta(x: Tensor) -> Tensor:
        return shrink(x, level, n, beta, loss)

    value = (u * eta(s)[:, None, :]) @ v.mT
    out = scale(value, batch.exponent).to(a.dtype)
    reason = torch.where(batch.finite, torch.where(ok, cert.NONE, cert.LAPACK), cert.NOT_FINITE)
    out = torch.where((~batch.finite)[:, None, None], math.nan, out)
    if not certify:
        return out.reshape(a.shape), uncertified(batch.shape, reason.device, methods=SVD_SHRINK, code=0, reason=reason)
    gap, gap_error = minus(pair(batch.x), rough(rough(pair(u), pair(torch.diag_embed(s))), transpose(pair(v))))
    defects = [minus(rough(transpose(pair(x)), pair(x)), eye_like(x)) for x in (u, v)]
    distance = norm(gap) + gap_error + sum((norm(f) + e) * norm(s) for f, e in defects)
    rounding = norm(scale(out.to(torch.float64), -batch.exponent) - value) + 4 * k * U * norm(value)
    size = norm(value)
    error = (distance * _slope(s, eta, distance) if k else distance * 0) + rounding
    bound = torch.where(error == 0, 0.0, error / (size - error).clamp_min(0)).nan_to_num(nan=math.inf)
    # All singular values are shrunk to 0 and none is near the edge: the answer is exactly zero.
    bound = torch.where((size == 0) & (eta(s + distance[:, None]).sum(-1) == 0), 0.0, bound)
    certificate = verdict(
        bound,
        default_rtol(rtol, a.dtype),
        reason,
        shape=batch.shape,
        methods=SVD_SHRINK,
        code=0,
        residual=norm(gap) / norm(batch.x).clamp_min(2.0**-1000),
        failure_probability=math.nan,
    )
    return out.reshape(a.shape), certificate


def svd_shrink(
    a: Float[Tensor, "*b m n"],
    noise: float | Tensor | None = None,
    *,
    loss: str = "frobenius",
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> Float[Tensor, "*b m n"]:
    """The low-rank matrix behind a noisy one: A with its singular values optimally shrunk.

    U η(Σ) Vᵀ; for the Frobenius loss η(y) = √((y² − β − 1)² − 4β) / y above 1 + √β and 0 below, in units of σ√n, with β
    the ratio of the shorter side to the longer, n.

    Args:
        a: `(..., m, n)`, a signal plus independent entries of mean 0.
        noise: the standard deviation σ ≥ 0 of those, one number or one for each matrix. If None, median(s)/√(n μ_β)
            with μ_β the median of the Marchenko–Pastur law, which is right where most singular values are noise.
        loss: the norm of the error to be least: "frobenius", "operator" or "nuclear".
        method: one of `SVD_SHRINK` or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the same value, and only seen failures raise.
    Returns: the matrices `(..., m, n)` in the dtype of `a`.
    Raises:
        ShapeError, DtypeError, InputError: for arguments that are not as above.
        ConvergenceError: for a matrix that is not finite, or where a singular value is so near the edge that rounding
            decides whether it is kept.
    Cost: one float64 SVD, and for the certificate five float64 products and some sixty passes over a matrix of the
    shorter side. Accuracy: rounding times the slope of η, to first order; an estimate, which takes the noise
    level as exact.
    Source: Gavish and Donoho, arXiv:1405.7511; the noise level, arXiv:1305.5870.

    >>> g = torch.Generator().manual_seed(0)
    >>> signal = 3 * torch.ones(100, 50)
    >>> noisy = signal + torch.randn(100, 50, generator=g)
    >>> bool(torch.dist(svd_shrink(noisy), signal) < torch.dist(noisy, signal) / 4)
    True
    """
    value, certificate = svd_shrink_ex(a, noise, loss=loss, method=method, rtol=rtol, certify=certify)
    require_converged("svd_shrink", certificate)
    return value
