"""The principal inverse p-th root of matrices that need not be symmetric, from certified functions of this package."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg.certificate import Certificate, default_rtol, uncertified, verdict
from gramian.linalg.engine.loading import Damping, check
from gramian.linalg.engine.real_form import takes_complex
from gramian.linalg.engine.rounding import U
from gramian.linalg.engine.transforms import has_no_values
from gramian.linalg.exponential import expm_ex
from gramian.linalg.inverse import inv_ex
from gramian.linalg.logarithm import logm_ex
from gramian.linalg.principal_root import principal_root_ex

METHODS = ("composed",)
FINE = 1e-12
"""The least rtol asked of the parts; what counts is the bound that they give."""

SHARE = 1e-4
"""The rtol asked of the parts at first, over that of the whole, which κ magnifies it to."""


@takes_complex("inv_root", square=True)
def principal_inverse_root_ex(
    m: Tensor,
    p: int,
    damping: Damping = 0.0,
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> tuple[Tensor, Certificate]:
    """(M + λI)^(-1/p): the inverse of the square root for p = 2, exp(−log(M)/p) beyond; derivatives are those of both.

    The parts' errors are composed: ‖(S + E)⁻¹ − S⁻¹‖ ≤ ‖S⁻¹‖² ‖E‖ / (1 − ‖S⁻¹‖‖E‖), and ‖e^(A+E) − e^A‖ ≤
    ‖E‖ e^(μ + ‖E‖), where μ is the largest eigenvalue of the symmetric part of A.
    """
    check("inv_root", m, square=True)
    if method not in ("auto", *METHODS):
        raise InputError(f"inv_root: unknown method {method!r} for symmetric=False. Use one of: auto, composed.")
    if p == 1:
        return inv_ex(m, damping, rtol=rtol, certify=certify)
    if p > 2 and (isinstance(damping, Tensor) or damping != 0):
        raise InputError(
            "inv_root: damping is for p ≤ 2 where symmetric=False. Add it to the matrix, which rounds: "
            "m + damping * torch.eye(n)."
        )
    tolerance = default_rtol(rtol, m.dtype)
    quick = SHARE * tolerance
    if certify and quick > FINE:
        value, certificate = _composed(m, p, damping, tolerance, quick, certify=True)
        if has_no_values(value) or bool(certificate.converged.all()):
            return value, certificate
    return _composed(m, p, damping, tolerance, FINE, certify=certify)


def _composed(
    m: Tensor, p: int, damping: Damping, tolerance: float, fine: float, *, certify: bool
) -> tuple[Tensor, Certificate]:
    """By parts to an rtol of `fine`, certified for one of `tolerance`."""
    wide = m.double()
    if p == 2:
        first, proof = principal_root_ex(wide, damping, rtol=fine, certify=certify)
        value, last = inv_ex(first, rtol=fine, certify=certify)
    else:
        first, proof = logm_ex(wide, rtol=fine, certify=certify)
        value, last = expm_ex(first / -p, rtol=fine, certify=certify)
    out = value.to(m.dtype)
    if has_no_values(out):
        return out, Certificate(*last.tensors(), methods=METHODS)
    if not certify:
        bare = uncertified(m.shape[:-2], m.device, methods=METHODS, code=0, steps=0)
        return out, replace(bare, reason=torch.where(proof.reason == cert.UNASKED, last.reason, proof.reason))
    with torch.no_grad():
        moved = proof.error_bound / (1 - proof.error_bound).clamp_min(0) * _size(first)
        size = _size(value)
        own = last.error_bound / (1 - last.error_bound).clamp_min(0) * size
        if p == 2:
            share = (size + own) * moved
            change = torch.where(share < 1, (size + own) * share / (1 - share), math.inf)
        else:
            a, moved = first / -p, (moved + U * _size(first)) / p
            change = moved * (_top(a) + moved).exp()
        bound = (own + change + _size(out.double() - value)) * (1 + 2.0**-20)
        bound = (bound / (size - own - change).clamp_min(0)).nan_to_num(nan=math.inf if m.shape[-1] else 0.0)
        reason = torch.where(proof.converged, last.reason, proof.reason)
        reason = torch.where(reason == cert.INACCURATE, cert.NONE, reason)
        whole = verdict(
            bound.flatten(),
            tolerance,
            reason.flatten(),
            shape=m.shape[:-2],
            methods=METHODS,
            code=0,
            residual=last.residual.flatten(),
        )
        failure = proof.failure_probability + last.failure_probability
        whole = replace(whole, kind=torch.maximum(proof.kind, last.kind), failure_probability=failure)
    return out, whole


def _size(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1))


def _top(a: Tensor) -> Tensor:
    """A bound on the largest eigenvalue of the symmetric part of each a (..., n, n); inf where it is not finite."""
    n = a.shape[-1]
    if not n:
        return a.sum((-2, -1))
    finite = a.isfinite().flatten(-2).all(-1)
    part = torch.where(finite[..., None, None], (a + a.mT) / 2, 0.0)
    top = torch.linalg.eigvalsh(part)[..., -1] + 16 * n * U * _size(part)
    return torch.where(finite, top, math.inf)
