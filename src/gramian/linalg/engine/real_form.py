"""Complex matrices as real ones of twice the side.

A = P + iQ ↦ [[P, −Q], [Q, P]] keeps sums, products, inverses and adjoints, and with them every function of matrices
that is made of these. So a certified function of the real form is one of A, its derivative included. Frobenius norms
are √2 times those of A: a relative error is the same. The nearest real form to what was computed, the mean of its
blocks, is no farther from the exact one than that was. Singular values, and eigenvalues of Hermitian matrices, occur
twice.

It takes twice the operations of complex arithmetic, and needs no second proof of any bound.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg.certificate import Certificate, default_rtol
from gramian.linalg.engine.loading import check
from gramian.linalg.engine.rounding import unit_roundoff

REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32}
"""The dtype of the parts of a complex number."""


def _parts(a: Tensor) -> tuple[Tensor, Tensor]:
    """The real and the imaginary part, also where it is real."""
    if not a.is_complex():
        return a, torch.zeros_like(a)
    # The imaginary part of a lazy conjugate would be a lazy negative, which vmap does not know.
    p, q = torch.view_as_real(a.resolve_conj()).unbind(-1)
    return p, q


def real_form(a: Tensor) -> Tensor:
    """[[P, −Q], [Q, P]] (..., 2m, 2n) of P + iQ (..., m, n), also where it is real.

    >>> real_form(torch.tensor([[1 + 2j]])).tolist()
    [[1.0, -2.0], [2.0, 1.0]]
    """
    p, q = _parts(a)
    return torch.cat([torch.cat([p, -q], -1), torch.cat([q, p], -1)], -2)


def stacked(b: Tensor) -> Tensor:
    """[P; Q] (..., 2n, k) of P + iQ (..., n, k), also where it is real: what the real form of a matrix multiplies."""
    return torch.cat(_parts(b), -2)


def unstacked(z: Tensor) -> Tensor:
    """P + iQ of [P; Q]."""
    p, q = z.chunk(2, -2)
    return torch.complex(p, q)


def nearest_complex(x: Tensor) -> tuple[Tensor, Tensor]:
    """The complex matrix (..., m, n) whose real form is nearest to x (..., 2m, 2n), and its relative rounding (...)."""
    (p, s), (r, q) = (half.chunk(2, -1) for half in x.chunk(2, -2))
    value = torch.complex(p / 2 + q / 2, r / 2 - s / 2)
    different = (p != q) | (r != -s)
    return value, _rounding(x.flatten(-2), different.flatten(-2).any(-1))


def mean_of_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each two numbers (..., 2k) that should be equal, and its relative rounding (...)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return first / 2 + second / 2, _rounding(x, (first != second).any(-1))


@torch.no_grad()
def _rounding(x: Tensor, different: Tensor) -> Tensor:
    """What the means of numbers x (..., k) round, relative to their norm, where some are `different` (...)."""
    if not x.shape[-1]:
        return x.sum(-1)
    info, size = torch.finfo(x.dtype), x.abs()
    # A half of a subnormal number may be rounded too.
    subnormal = ((size > 0) & (size < 2 * info.tiny)).any(-1)
    least = info.tiny * info.eps
    peak = size.amax(-1).double().clamp_min(least)
    return torch.where(different | subnormal, unit_roundoff(x.dtype) + x.shape[-1] * least / peak, 0.0)


def less_certain(proof: Certificate, rounding: Tensor, rtol: float) -> Certificate:
    """The certificate after one more rounding, relative to the value."""
    bound = (proof.error_bound + rounding * (1 + proof.error_bound)) * (1 + 2.0**-50)
    bound = torch.where(rounding > 0, bound, proof.error_bound)
    converged = proof.converged & (bound <= rtol)
    reason = torch.where(proof.converged & ~converged, cert.INACCURATE, proof.reason)
    rest = {name: getattr(proof, name) for name in Certificate.fields()}
    rest |= {"converged": converged, "error_bound": bound, "reason": reason}
    return Certificate(*rest.values(), methods=proof.methods)


def takes_complex(name: str, *, square: bool = False) -> Callable[[Callable], Callable]:
    """Let a certified function whose first argument is a batch of matrices, and whose value is one, take complex ones.

    The function must commute with `real_form`.
    """

    def decorated(function: Callable[..., tuple[Tensor, Certificate]]) -> Callable[..., tuple[Tensor, Certificate]]:
        first = next(iter(inspect.signature(function).parameters))

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> tuple[Tensor, Certificate]:
            a = args[0] if args else kwargs.get(first)
            if not isinstance(a, Tensor) or not a.is_complex():
                return function(*args, **kwargs)
            x = real_form(check(name, a, square=square, real=False))
            found, proof = function(x, *args[1:], **{k: v for k, v in kwargs.items() if k != first})
            value, rounding = nearest_complex(found)
            return value, less_certain(proof, rounding, default_rtol(kwargs.get("rtol"), a.dtype))

        return wrapper

    return decorated
