"""Least squares at any rank, with certificates."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Inexact
from torch import Tensor

from gramian.errors import ShapeError
from gramian.linalg import certificate as cert
from gramian.linalg.certificate import default_rtol, require_converged, uncertified, verdict
from gramian.linalg.engine.batches import broadcast
from gramian.linalg.engine.loading import Damping, check, damping_of
from gramian.linalg.engine.rounding import gamma
from gramian.linalg.engine.transforms import has_no_values
from gramian.linalg.pseudoinverse import RankedCertificate, default_tolerance, pinv_at

__all__ = ["lstsq", "lstsq_ex"]


def lstsq_ex(
    a: Inexact[Tensor, ...],
    b: Inexact[Tensor, ...],
    damping: Damping = 0.0,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> tuple[Inexact[Tensor, ...], RankedCertificate]:
    """`lstsq` with its certificate, which says the rank, never raising for a matrix's values.

    Args:
        a, b, damping, rank, tolerance, method, rtol, certify: as for `lstsq`.
    Returns: the solution and its `RankedCertificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `lstsq`.
    Source: as for `lstsq`.

    >>> value, certificate = lstsq_ex(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
    >>> value.tolist(), certificate.rank.item(), certificate.converged.item()
    ([[2.0]], 1, True)
    """
    check("lstsq", a, real=False)
    vector = isinstance(b, Tensor) and (b.ndim == 1 or b.shape == a.shape[:-1])
    right = check("lstsq", b[..., None] if vector else b, real=False)
    batch = broadcast(a.shape[:-2], right.shape[:-2])
    if batch is None or a.shape[-2] != right.shape[-2]:
        raise ShapeError(
            f"lstsq: expected (..., m, n) and (..., m, k), (m,) or (..., m), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}. The batch dimensions are broadcast; a vector that is broadcast too is b[..., None]."
        )
    dtype, m = torch.promote_types(a.dtype, right.dtype), a.shape[-2]
    bound, tolerance = default_rtol(rtol, dtype), default_tolerance(a) if tolerance is None else tolerance
    wide = torch.promote_types(dtype, torch.float64)
    matrix, right = a.to(torch.promote_types(a.dtype, torch.float64)), right.to(wide)
    if isinstance(damping, Tensor) or damping != 0:
        # ‖AX − B‖² + λ‖X‖² = ‖[A; √λ I]X − [B; 0]‖², of full rank.
        shift = damping_of("lstsq", damping, a).reshape(a.shape[:-2])
        if isinstance(damping, Tensor):
            shift = damping.to(torch.float64).expand(a.shape[:-2])
        eye = torch.eye(a.shape[-1], dtype=matrix.dtype, device=a.device)
        matrix = torch.cat([matrix, shift.sqrt()[..., None, None] * eye], -2)
    y, proof = pinv_at("lstsq", matrix, rank, tolerance, method, min(bound, 1e-10), certify)
    y = y[..., :m].to(wide)
    value = y @ right
    found = proof.rank.expand(batch)
    if has_no_values(value):
        tensors = (x.new_empty(batch) for x in proof.tensors())
        return _shaped(value.to(dtype), vector), RankedCertificate(*tensors, methods=("pinv",), rank=found)
    out = value.to(dtype)
    if not certify:
        bare = uncertified(batch, a.device, methods=("pinv",), code=0, steps=0)
        finite = right.isfinite().flatten(-2).all(-1)
        bare = replace(bare, reason=torch.where(finite, proof.reason, cert.NOT_FINITE).expand(batch))
        return _shaped(out, vector), RankedCertificate(*bare.tensors(), methods=("pinv",), rank=found)
    with torch.no_grad():
        sizes = [torch.linalg.vector_norm(x, dim=(-2, -1)) for x in (y, right, value, out.to(wide) - value)]
        left, length, whole, rounding = (x.expand(batch).flatten() for x in sizes)
        # The rounding of the pseudoinverse, of √λ, of the product, and to the dtype.
        lost = proof.error_bound.expand(batch).flatten() * 1.01 + 4 * gamma(m + 2)
        error = lost * left * length + rounding
        share = torch.where(length == 0, 0.0, error / (whole - error).clamp_min(0))
        reason = proof.reason.expand(batch).flatten()
        reason = torch.where((reason == cert.INACCURATE) & share.isfinite(), cert.NONE, reason)
        reason = torch.where(length.isfinite(), reason, cert.NOT_FINITE)
        residual = proof.residual.expand(batch).flatten()
        whole_proof = verdict(share, bound, reason, shape=batch, methods=("pinv",), code=0, residual=residual)
    return _shaped(out, vector), RankedCertificate(*whole_proof.tensors(), methods=("pinv",), rank=found)


def _shaped(value: Tensor, vector: bool) -> Tensor:
    return value[..., 0] if vector else value


def lstsq(
    a: Inexact[Tensor, ...],
    b: Inexact[Tensor, ...],
    damping: Damping = 0.0,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> Inexact[Tensor, ...]:
    """The X with the least ‖AX − B‖² + λ‖X‖², and of several of them, at λ = 0, the one with the least ‖X‖.

    X = A†B at λ = 0, with the pseudoinverse at the rank told, or at that above the tolerance; see `pinv`.

    Args:
        a: `(..., m, n)`.
        b: `(..., m, k)`, or a vector: `(m,)`, or the shape of `a` without its last dimension. Batches are broadcast.
        damping: λ ≥ 0, absolute, one number or one per matrix of `a`; its derivative needs λ > 0.
        rank, tolerance: as for `pinv`; at λ > 0 of A over √λ I, whose rank is full.
        method: the name of a method of `pinv`, or "auto".
        rtol: the relative Frobenius error of X asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: the solution `(..., n, k)`, without k for a vector, in the wider dtype of `a` and `b`.
    Raises:
        ShapeError: where `a` has fewer than two dimensions, or `b` or `damping` does not fit it.
        DtypeError: where `a` or `b` is not floating point, real or complex.
        InputError: as for `pinv`, or for a negative damping.
        ConvergenceError: where the rank is not certain, or the error bound is above rtol.
    Cost: as for `pinv`, and a product. Accuracy: u ‖A†‖ ‖B‖ / ‖X‖. The certificate's residual is that of `pinv`.
    Source: Björck, Numerical Methods for Least Squares Problems (1996), §1.2 and §5.3.

    >>> a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0], [3.0], [5.0]])
    >>> lstsq(a, b).round(decimals=5).tolist()
    [[1.0], [2.0]]
    """
    value, certificate = lstsq_ex(
        a, b, damping, rank=rank, tolerance=tolerance, method=method, rtol=rtol, certify=certify
    )
    require_converged("lstsq", certificate)
    return value
