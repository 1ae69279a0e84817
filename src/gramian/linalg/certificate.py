"""What a matrix function knows about its own answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gramian.errors import ConvergenceError, InputError

KINDS = ("bound", "estimate")
"""A bound is never below the true error; an estimate can be, with the probability the certificate states."""

REASONS = (
    "none",
    "the matrix holds NaN or inf",
    "the answer does not exist: the matrix is singular or rank-deficient",
    "the matrix is not symmetric",
    "the answer does not exist: the matrix has negative eigenvalues beyond rounding",
    "the error bound is above rtol",
    "LAPACK did not converge",
)
NONE, NOT_FINITE, SINGULAR, NOT_SYMMETRIC, INDEFINITE, INACCURATE, LAPACK = range(len(REASONS))

RTOL = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Default relative error asked for. Half types: a few roundings of the answer itself. Wider types: far enough above the
rounding that ordinary ill-conditioned input passes, and the bound, not this number, says how good the answer is."""


@dataclass(frozen=True)
class Certificate:
    """What a matrix function knows about its own answer; every tensor has one entry per matrix of the batch.

    `error_bound` is a bound on ‖answer − exact‖_F / ‖exact‖_F, exact being the function of the matrix as given (damping
    included). `residual` is how far the answer is from satisfying its defining equation, as each function says.

    >>> import gramian.linalg as gl
    >>> value, certificate = gl.inv_ex(torch.tensor([[[2.0]], [[0.0]]]))
    >>> certificate.converged.tolist(), certificate.reasons
    ([True, False], ['none', 'the answer does not exist: the matrix is singular or rank-deficient'])
    """

    converged: Bool[Tensor, "*b"]
    residual: Float[Tensor, "*b"]
    error_bound: Float[Tensor, "*b"]
    kind: Int[Tensor, "*b"]
    failure_probability: Float[Tensor, "*b"]
    steps: Int[Tensor, "*b"]
    method: Int[Tensor, "*b"]
    reason: Int[Tensor, "*b"]
    methods: tuple[str, ...] = ()

    @property
    def method_names(self) -> list[str]:
        """The route each matrix took, by name, in row-major order of the batch (waits for the device)."""
        return [self.methods[code] for code in self.method.flatten().tolist()]

    @property
    def kind_names(self) -> list[str]:
        """Whether each `error_bound` is a bound or an estimate, in row-major order of the batch."""
        return [KINDS[code] for code in self.kind.flatten().tolist()]

    @property
    def reasons(self) -> list[str]:
        """Why each matrix failed, `"none"` where it did not, in row-major order of the batch."""
        return [REASONS[code] for code in self.reason.flatten().tolist()]


def default_rtol(rtol: float | None, dtype: torch.dtype) -> float:
    """`rtol`, or what `RTOL` says for the dtype."""
    if rtol is None:
        return RTOL[dtype]
    if not rtol >= 0:
        raise InputError(f"rtol: expected a number ≥ 0, got {rtol}. Leave it out for the dtype's default.")
    return float(rtol)


def require_converged(name: str, certificate: Certificate) -> None:
    """Raise a `ConvergenceError` that names the failed matrices, why, and what to do."""
    if bool(certificate.converged.all()):
        return
    failed = (~certificate.converged.flatten()).nonzero().flatten().tolist()
    reasons = certificate.reasons
    bounds = certificate.error_bound.flatten().tolist()
    shown = "; ".join(f"matrix {i}: {reasons[i]} (error bound {bounds[i]:.1e})" for i in failed[:3])
    more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
    raise ConvergenceError(
        f"{name}: {len(failed)} of {len(reasons)} matrices failed their certificate. {shown}{more}. "
        f"Use {name}_ex for the value and the certificate, "
        "add damping where the function takes it, pass a wider dtype, or loosen rtol."
    )
