"""From an error bound and a reason to a certificate, for answers that are not one matrix per matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg.certificate import Certificate


def verdict(
    bound: Tensor,
    rtol: float,
    reason: Tensor,
    *,
    shape: Sequence[int],
    methods: Sequence[str],
    code: int | Tensor,
    residual: Tensor | None = None,
    steps: int | Tensor = 0,
    failure_probability: float | None = None,
) -> Certificate:
    """The certificate of answers whose relative error is at most `bound` (B,), reshaped to `shape`.

    A `reason` other than none or inaccurate makes the bound inf. With a `failure_probability` (NaN: not known), the
    bound is an estimate.
    """
    decided = (reason != cert.NONE) & (reason != cert.INACCURATE)
    bound = torch.where(decided, math.inf, bound.to(torch.float64)).nan_to_num(nan=math.inf, posinf=math.inf)
    converged = (reason == cert.NONE) & (bound <= rtol)
    reason = torch.where((reason == cert.NONE) & ~converged, cert.INACCURATE, reason)
    lost = reason == cert.NOT_FINITE
    residual = torch.zeros_like(bound) if residual is None else residual.to(torch.float64)
    estimate = failure_probability is not None

    def full(value: float | Tensor, like: Tensor) -> Tensor:
        return (torch.zeros_like(like) + value).reshape(tuple(shape))

    return Certificate(
        converged=converged.reshape(tuple(shape)),
        residual=torch.where(lost, math.nan, residual).reshape(tuple(shape)),
        error_bound=bound.reshape(tuple(shape)),
        kind=full(int(estimate), reason),
        failure_probability=full(failure_probability if failure_probability is not None else 0.0, bound),
        steps=full(steps, reason),
        method=full(code, reason),
        reason=reason.reshape(tuple(shape)),
        methods=tuple(methods),
    )
