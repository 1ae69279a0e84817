"""From an error bound and a reason to a certificate, for answers that are not one matrix per matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

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

    def full(value: float | int | Tensor, like: Tensor) -> Tensor:
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


class Number(NamedTuple):
    """A number for each matrix (B,), a bound on its absolute error, why it failed, and steps.

    `failure_probability` is None for a bound, and NaN where an estimate does not know it.
    """

    value: Tensor
    error: Tensor
    reason: Tensor
    steps: int = 0
    failure_probability: float | None = None


def numbers(
    family: Mapping[str, Callable[..., Number]],
    names: Sequence[str],
    rtol: float,
    dtype: torch.dtype,
    x: Tensor,
    finite: Tensor,
    shape: Sequence[int],
    back: Callable[[Tensor, Tensor], Tensor],
    **options: object,
) -> tuple[Tensor, Certificate]:
    """The first route on every matrix of x (B, m, n), each next on those that still fail; `back` unscales values,
    given which rows they are of.

    One wait for the device per escalation.
    """
    methods = tuple(family)
    rows = torch.arange(x.shape[0], device=x.device)
    value = torch.full((x.shape[0],), math.nan, dtype=torch.float64, device=x.device)
    best = torch.full_like(value, math.inf)
    code, steps, reason = (torch.zeros_like(rows) for _ in range(3))
    probability, estimate = torch.zeros_like(best), torch.zeros_like(rows)
    reason = torch.where(finite, cert.INACCURATE, cert.NOT_FINITE)
    rows = rows[finite]
    # Rounding the answer to `dtype` adds to its error: a route must leave room for that.
    asked = rtol - min(rtol, torch.finfo(dtype).eps) / 2
    for name in names:
        if not rows.numel():
            break
        found = family[name](x if rows.numel() == x.shape[0] else x[rows], rtol=asked, **options)
        out = back(found.value, rows)
        rounded = out.to(dtype).to(torch.float64)
        size = found.value.abs()
        bound = found.error / (size - found.error).clamp_min(0) + torch.where(
            out == rounded, 0.0, (out - rounded).abs() / out.abs()
        )
        bound = torch.where((found.error == 0) & (out == rounded), 0.0, bound).nan_to_num(nan=math.inf)
        decided = (found.reason != cert.NONE) & (found.reason != cert.INACCURATE)
        bound = torch.where(decided, math.inf, bound)
        better = (bound < best[rows]) | value[rows].isnan() | (decided & (best[rows] > rtol))
        kept = rows[better]
        value[kept], best[kept] = out[better], bound[better]
        code[kept], steps[kept] = methods.index(name), found.steps
        reason[kept] = torch.where(decided | (bound > rtol), found.reason, cert.NONE)[better]
        probability[kept] = 0.0 if found.failure_probability is None else found.failure_probability
        estimate[kept] = int(found.failure_probability is not None)
        rows = rows[(best[rows] > rtol) & ((reason[rows] == cert.INACCURATE) | (reason[rows] == cert.NONE))]
    proof = verdict(best, rtol, reason, shape=shape, methods=methods, code=code, steps=steps)
    proof = replace(proof, kind=estimate.reshape(tuple(shape)), failure_probability=probability.reshape(tuple(shape)))
    return value.to(dtype).reshape(tuple(shape)), proof
