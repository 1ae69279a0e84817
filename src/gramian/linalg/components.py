"""Principal components of streamed data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import DtypeError, InputError, ShapeError, UnsupportedError
from gramian.linalg import certificate as cert
from gramian.linalg import singular_derivatives
from gramian.linalg.certificate import Certificate, default_rtol, require_converged, uncertified, verdict
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.loading import check, choose
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.scaling import exponent_of, scale
from gramian.linalg.engine.transforms import has_tangent, transforming
from gramian.linalg.products import syrk


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
    x: Tensor | Iterable[Tensor], k: int, *, method: str, rtol: float | None, strict: bool, certify: bool
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
    components = v[0].flip(-1)[:, :k].mT
    if k:
        peak = components.gather(1, components.abs().argmax(1, keepdim=True))
        components = components * torch.where(peak < 0, -1.0, 1.0)
    exact = w.clamp_min(0)[0].flip(-1)[:k]
    variance = scale(exact[None], 2 * seen.exponent)[0].to(seen.dtype)
    rounded = components.to(seen.dtype)
    reason = torch.where(ok, cert.NONE, cert.LAPACK)
    mean = scale(seen.mean, seen.exponent)[0].to(seen.dtype)
    if not seen.finite:
        reason = torch.full_like(reason, cert.NOT_FINITE)
        mean = mean * math.nan
    made = PCA(rounded, variance, mean) if seen.finite else PCA(rounded * math.nan, variance * math.nan, mean)
    if not certify:
        return made, uncertified((), reason.device, methods=PCA_METHODS, code=0, reason=reason)
    # Weyl: with CV = VW + R and VᵀV = I + F every eigenvalue is within ‖R‖ + ‖F‖‖C‖, over 1 − ‖F‖, of its w.
    skew = norm(v.mT @ v - torch.eye(d, dtype=v.dtype, device=v.device)) + gamma(d) * d
    residual = norm(covariance @ v - v * w[:, None, :])
    weyl = (residual + (gamma(d + 2) * math.sqrt(max(d, 1)) + skew) * norm(covariance)) / (1 - skew).clamp_min(0.5)
    # The variance along a rounded component, and a rounded variance.
    top = w.amax(-1).clamp_min(0) if d else weyl * 0
    turned = 2 * (rounded.to(torch.float64) - components).norm(dim=1).amax() if k else 0.0
    shift = (scale(variance.to(torch.float64)[None], -2 * seen.exponent)[0] - exact).abs().amax() if k else 0.0
    error = weyl + seen.error / (seen.num_rows - 1) + turned * top + shift
    bound = torch.where(error == 0, 0.0, error / (top - error).clamp_min(0)).nan_to_num(nan=math.inf)
    proof = verdict(
        bound,
        default_rtol(rtol, seen.dtype),
        reason,
        shape=(),
        methods=PCA_METHODS,
        code=0,
        residual=residual / norm(covariance).clamp_min(2.0**-1000),
    )
    return made, proof


def pca_ex(
    x: Float[Tensor, "n d"] | Iterable[Tensor],
    k: int,
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
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
        certify: whether to bound the error; if False, the same value, and only seen failures raise.
    Returns: the `PCA`, and its certificate; its residual is ‖CV − VΛ‖_F / ‖C‖_F of the covariance C.
    Raises: `ShapeError`, `DtypeError`, `InputError`.
    Cost: as `pca`.
    Source: Chan, Golub, LeVeque, The American Statistician 37 (1983), eq. 1.5; Jolliffe, Principal Component Analysis.

    >>> result, certificate = pca_ex(torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]]), 1)
    >>> round(result.explained_variance.item(), 3), certificate.converged.item()
    (4.0, True)
    """
    return _pca(x, k, method=method, rtol=rtol, strict=False, certify=certify)


def pca(
    x: Float[Tensor, "n d"] | Iterable[Tensor],
    k: int,
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> PCA:
    """The k directions of largest variance, from rows that may come in batches.

    The eigenvectors of Σ (xᵢ − x̄)(xᵢ − x̄)ᵀ / (n − 1). Batches are centered about their own means and merged, so that a
    large mean costs no digits.

    Args:
        x: `(n, d)`, n ≥ 2 samples of d features, or any iterable of such batches of rows.
        k: the number of components, from 0 to min(n, d).
        method: one of `PCA_METHODS` or "auto".
        rtol: the error of the variances asked for, relative to the largest; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the same value, and only seen failures raise.
    Returns: a `PCA` in the dtype of the rows; the largest entry of each component is positive.
    Raises:
        ShapeError, DtypeError: for rows that are not as above or not finite; the error names the batch.
        InputError: for another k, or fewer than two rows.
        ConvergenceError: where the error bound is above rtol.
    Cost: one float64 product of the rows and one eigendecomposition of (d, d), and for the certificate two float64
    products; memory d². Accuracy: variances to about
    1e-15 of the largest; a component to that over its relative gap.
    Source: Chan, Golub, LeVeque, The American Statistician 37 (1983), eq. 1.5; Jolliffe, Principal Component Analysis.

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.1]])
    >>> result = pca(iter(x.split(2)), 1)
    >>> result.mean.tolist()[0], round(result.explained_variance.item(), 2)
    (2.0, 4.0)
    """
    value, certificate = _pca(x, k, method=method, rtol=rtol, strict=True, certify=certify)
    require_converged("pca", certificate)
    return value
