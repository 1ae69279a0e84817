"""Denoising by optimal shrinkage of singular values, and principal components of streamed data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import DtypeError, InputError, ShapeError, UnsupportedError
from gramian.linalg import certificate as cert
from gramian.linalg import singular_derivatives
from gramian.linalg.certificate import Certificate, default_rtol, require_converged, verdict
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import eye_like, minus, pair, rough, transpose
from gramian.linalg.engine.loading import check, choose, load
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.scaling import exponent_of, scale
from gramian.linalg.engine.transforms import has_tangent, transforming
from gramian.linalg.products import syrk


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
    theta = (torch.arange(steps, dtype=torch.float64) + 0.5) * (math.pi / steps)
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
) -> tuple[Float[Tensor, "*b m n"], Certificate]:
    """`svd_shrink` with its certificate, never raising for a matrix's values.

    Args:
        a: `(..., m, n)`.
        noise: σ ≥ 0, one number or one for each matrix; estimated if None.
        loss: "frobenius", "operator" or "nuclear".
        method: one of `SVD_SHRINK` or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
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
    gap, gap_error = minus(pair(batch.x), rough(rough(pair(u), pair(torch.diag_embed(s))), transpose(pair(v))))
    defects = [minus(rough(transpose(pair(x)), pair(x)), eye_like(x)) for x in (u, v)]
    distance = norm(gap) + gap_error + sum((norm(f) + e) * norm(s) for f, e in defects)
    out = scale(value, batch.exponent).to(a.dtype)
    rounding = norm(scale(out.to(torch.float64), -batch.exponent) - value) + 4 * k * U * norm(value)
    size = norm(value)
    error = (distance * _slope(s, eta, distance) if k else distance * 0) + rounding
    bound = torch.where(error == 0, 0.0, error / (size - error).clamp_min(0)).nan_to_num(nan=math.inf)
    # All singular values are shrunk to 0 and none is near the edge: the answer is exactly zero.
    bound = torch.where((size == 0) & (eta(s + distance[:, None]).sum(-1) == 0), 0.0, bound)
    reason = torch.where(batch.finite, torch.where(ok, cert.NONE, cert.LAPACK), cert.NOT_FINITE)
    out = torch.where((~batch.finite)[:, None, None], math.nan, out)
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
    Returns: the matrices `(..., m, n)` in the dtype of `a`.
    Raises:
        ShapeError, DtypeError, InputError: for arguments that are not as above.
        ConvergenceError: for a matrix that is not finite, or where a singular value is so near the edge that rounding
            decides whether it is kept.
    Cost: one float64 SVD. Accuracy: rounding times the slope of η, to first order; an estimate, which takes the noise
    level as exact.
    Source: Gavish and Donoho, arXiv:1405.7511; the noise level, arXiv:1305.5870.

    >>> g = torch.Generator().manual_seed(0)
    >>> signal = 3 * torch.ones(100, 50)
    >>> noisy = signal + torch.randn(100, 50, generator=g)
    >>> bool(torch.dist(svd_shrink(noisy), signal) < torch.dist(noisy, signal) / 4)
    True
    """
    value, certificate = svd_shrink_ex(a, noise, loss=loss, method=method, rtol=rtol)
    require_converged("svd_shrink", certificate)
    return value


class PCA(NamedTuple):
    """Principal components.

    Attributes:
        components: `(k, d)`, orthonormal rows.
        explained_variance: the variance along each `(k,)`, descending, with divisor n − 1.
        mean: of the rows `(d,)`.
    """

    components: Tensor
    explained_variance: Tensor
    mean: Tensor


class _Moments(NamedTuple):
    """Rows seen so far, times 2^-exponent: their number, mean (1, d), Σ (x − x̄)(x − x̄)ᵀ (1, d, d), and bounds on the
    rounding of the mean and of the sum in Frobenius norm; `finite` whether all were."""

    num_rows: int
    mean: Tensor
    total: Tensor
    exponent: Tensor
    mean_error: Tensor
    error: Tensor
    dtype: torch.dtype
    finite: bool


def _moments(batches: Iterable[Tensor], strict: bool) -> _Moments:
    """Merged batch by batch about the batches' own means. Chan, Golub, LeVeque, eq. 1.5."""
    seen: _Moments | None = None
    first, constant = None, True
    for i, rows in enumerate(batches):
        check("pca", rows)
        if rows.ndim != 2 or (seen is not None and rows.shape[1] != seen.mean.shape[1]):
            wanted = "d" if seen is None else seen.mean.shape[1]
            raise ShapeError(f"pca: batch {i}: expected rows (n, {wanted}), got {tuple(rows.shape)}.")
        finite = bool(rows.isfinite().all())
        if strict and not finite:
            raise DtypeError(f"pca: batch {i} holds NaN or inf. Drop or fill those rows first.")
        wide = rows.to(torch.float64)[None].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        n, d = rows.shape
        first = wide[:, :1] if first is None and n else first
        constant = constant and (first is None or torch.equal(wide, first.expand_as(wide)))
        if seen is None:
            zero = wide.new_zeros(1)
            seen = _Moments(
                0, wide.new_zeros(1, d), wide.new_zeros(1, d, d), exponent_of(wide), zero, zero, rows.dtype, True
            )
        e = torch.maximum(seen.exponent, exponent_of(wide))
        down = seen.exponent - e
        mean, total = scale(seen.mean, down), scale(seen.total, 2 * down)
        mean_error, error = scale(seen.mean_error, down), scale(seen.error, 2 * down)
        count = seen.num_rows + n
        if n:
            wide = scale(wide, -e)
            center = wide.mean(1)
            step, weight = center - mean, n / count
            spread = wide - center[:, None, :]
            # The center is off by `slip`, which enters the sum of squares about it in second order, the step in first.
            slip = gamma(n) * norm(wide.abs().mean(1))
            apart = norm(step)
            error = error + gamma(n + 4) * norm(spread) ** 2 + n * slip**2 + 4 * U * norm(total)
            error = error + seen.num_rows * weight * (apart * (2 * (slip + mean_error) + 8 * U * (1 + apart)))
            total = total + syrk(spread) + step[:, :, None] * step[:, None, :] * (seen.num_rows * weight)
            mean = mean + step * weight
            mean_error = torch.maximum(mean_error, slip) + 4 * U * norm(mean)
        dtype = torch.promote_types(seen.dtype, rows.dtype)
        seen = _Moments(count, mean, total, e, mean_error, error, dtype, seen.finite and finite)
    if seen is None or seen.num_rows < 2:
        came = 0 if seen is None else seen.num_rows
        raise InputError(f"pca: expected at least 2 rows, got {came}. An iterator can be read only once.")
    if constant and first is not None:
        # No rounding: the mean is the row, and nothing varies about it.
        zero, mean = seen.error * 0, scale(first[:, 0], -seen.exponent)
        return seen._replace(mean=mean, total=seen.total * 0, mean_error=zero, error=zero)
    return seen


def _constant(batches: Iterable[Tensor]) -> Iterable[Tensor]:
    """The batches; an error for one that is in a graph, which would be cut off."""
    for rows in batches:
        if isinstance(rows, Tensor) and (rows.requires_grad or transforming() or has_tangent(rows)):
            raise UnsupportedError(
                "pca: batches that come one by one have no derivative. Pass one tensor, or detach the rows."
            )
        yield rows


PCA_METHODS = ("covariance",)


@differentiable(
    singular_derivatives.PCA,
    shapes=lambda x, k, **_: PCA(x.new_empty(k, x.shape[1]), x.new_empty(k), x.new_empty(x.shape[1])),
    methods=PCA_METHODS,
    batched=False,
    made=PCA,
    x=2,
)
def _pca(
    x: Tensor | Iterable[Tensor], k: int, *, method: str, rtol: float | None, strict: bool
) -> tuple[PCA, Certificate]:
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise InputError(f"pca: expected an integer k ≥ 0, got {k!r}.")
    choose("pca", method, dict.fromkeys(PCA_METHODS))
    seen = _moments([x] if isinstance(x, Tensor) else _constant(x), strict)
    d = seen.mean.shape[1]
    if k > min(seen.num_rows, d):
        raise InputError(f"pca: expected k from 0 to min(n, d) = {min(seen.num_rows, d)}, got {k}.")
    covariance = seen.total / (seen.num_rows - 1)
    w, v, ok = lapack.eigh(covariance)
    # Weyl: with CV = VW + R and VᵀV = I + F every eigenvalue is within ‖R‖ + ‖F‖‖C‖, over 1 − ‖F‖, of its w.
    skew = norm(v.mT @ v - torch.eye(d, dtype=v.dtype, device=v.device)) + gamma(d) * d
    residual = norm(covariance @ v - v * w[:, None, :])
    weyl = (residual + (gamma(d + 2) * math.sqrt(max(d, 1)) + skew) * norm(covariance)) / (1 - skew).clamp_min(0.5)
    components = v[0].flip(-1)[:, :k].mT
    if k:
        peak = components.gather(1, components.abs().argmax(1, keepdim=True))
        components = components * torch.where(peak < 0, -1.0, 1.0)
    exact = w.clamp_min(0)[0].flip(-1)[:k]
    variance = scale(exact[None], 2 * seen.exponent)[0].to(seen.dtype)
    rounded = components.to(seen.dtype)
    # The variance along a rounded component, and a rounded variance.
    top = w.amax(-1).clamp_min(0) if d else weyl * 0
    turned = 2 * (rounded.to(torch.float64) - components).norm(dim=1).amax() if k else 0.0
    shift = (scale(variance.to(torch.float64)[None], -2 * seen.exponent)[0] - exact).abs().amax() if k else 0.0
    error = weyl + seen.error / (seen.num_rows - 1) + turned * top + shift
    bound = torch.where(error == 0, 0.0, error / (top - error).clamp_min(0)).nan_to_num(nan=math.inf)
    reason = torch.where(ok, cert.NONE, cert.LAPACK)
    if not seen.finite:
        reason = torch.full_like(reason, cert.NOT_FINITE)
        rounded, variance = rounded * math.nan, variance * math.nan
    proof = verdict(
        bound,
        default_rtol(rtol, seen.dtype),
        reason,
        shape=(),
        methods=PCA_METHODS,
        code=0,
        residual=residual / norm(covariance).clamp_min(2.0**-1000),
    )
    mean = scale(seen.mean, seen.exponent)[0].to(seen.dtype)
    return PCA(rounded, variance, mean if seen.finite else mean * math.nan), proof


def pca_ex(
    x: Float[Tensor, "n d"] | Iterable[Tensor], k: int, *, method: str = "auto", rtol: float | None = None
) -> tuple[PCA, Certificate]:
    """`pca` with its certificate, never raising for the values of the rows.

    `error_bound` is relative to the largest variance: the variance along each component, and the largest that k
    orthonormal directions can have one by one, are within it of `explained_variance`. The directions are only as
    accurate as the gaps between the variances allow.

    Args:
        x: `(n, d)`, n ≥ 2 samples of d features, or any iterable of such batches of rows.
        k: the number of components, from 0 to min(n, d).
        method: one of `PCA_METHODS` or "auto".
        rtol: the error of the variances asked for, relative to the largest; `certificate.RTOL` of the dtype if None.
    Returns: the `PCA`, and its certificate; its residual is ‖CV − VΛ‖_F / ‖C‖_F of the covariance C.
    Raises: `ShapeError`, `DtypeError`, `InputError`.
    Cost: as `pca`.
    Source: Chan, Golub, LeVeque, The American Statistician 37 (1983), eq. 1.5; Jolliffe, Principal Component Analysis.

    >>> result, certificate = pca_ex(torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]]), 1)
    >>> round(result.explained_variance.item(), 3), certificate.converged.item()
    (4.0, True)
    """
    return _pca(x, k, method=method, rtol=rtol, strict=False)


def pca(x: Float[Tensor, "n d"] | Iterable[Tensor], k: int, *, method: str = "auto", rtol: float | None = None) -> PCA:
    """The k directions of largest variance, from rows that may come in batches.

    The eigenvectors of Σ (xᵢ − x̄)(xᵢ − x̄)ᵀ / (n − 1). Batches are centered about their own means and merged, so that a
    large mean costs no digits.

    Args:
        x: `(n, d)`, n ≥ 2 samples of d features, or any iterable of such batches of rows.
        k: the number of components, from 0 to min(n, d).
        method: one of `PCA_METHODS` or "auto".
        rtol: the error of the variances asked for, relative to the largest; `certificate.RTOL` of the dtype if None.
    Returns: a `PCA` in the dtype of the rows; the largest entry of each component is positive.
    Raises:
        ShapeError, DtypeError: for rows that are not as above or not finite; the error names the batch.
        InputError: for another k, or fewer than two rows.
        ConvergenceError: where the error bound is above rtol.
    Cost: one float64 product of the rows and one eigendecomposition of (d, d); memory d². Accuracy: variances to about
    1e-15 of the largest; a component to that over its relative gap.
    Source: Chan, Golub, LeVeque, The American Statistician 37 (1983), eq. 1.5; Jolliffe, Principal Component Analysis.

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.1]])
    >>> result = pca(iter(x.split(2)), 1)
    >>> result.mean.tolist()[0], round(result.explained_variance.item(), 2)
    (2.0, 4.0)
    """
    value, certificate = _pca(x, k, method=method, rtol=rtol, strict=True)
    require_converged("pca", certificate)
    return value
