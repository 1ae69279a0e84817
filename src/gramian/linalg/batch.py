"""From what the caller gave to a batch of finite, scaled float64 matrices, and back with a certificate.

LAPACK raises for, or poisons, a whole batch when one matrix holds NaN, and overflows on products of large entries. So
non-finite matrices are replaced by the identity and marked, and every matrix is scaled by a power of two, which rounds
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from gramian.errors import DtypeError, InputError, ShapeError
from gramian.linalg import certificate as cert
from gramian.linalg.certificate import Certificate

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Batch:
    """Matrices `original = x · 2^exponent`, flattened to (B, m, n); `x` is finite, with entries below 1."""

    x: Tensor
    exponent: Tensor
    finite: Tensor
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Answer:
    """What a route found: the value, a bound on its absolute Frobenius error, its residual, why it failed."""

    value: Tensor
    error: Tensor
    residual: Tensor
    reason: Tensor
    steps: int = 0


Route = Callable[..., Answer]


def check(name: str, a: object, *, square: bool = False) -> Tensor:
    """`a` if it is a real matrix or a batch of them; otherwise say what came and what was wanted."""
    if not isinstance(a, Tensor):
        raise DtypeError(f"{name}: expected a torch.Tensor, got {type(a).__name__}. Use torch.as_tensor first.")
    if a.dtype not in DTYPES:
        raise DtypeError(
            f"{name}: expected float64, float32, float16 or bfloat16, got {a.dtype}. Convert with .to(torch.float32)."
        )
    if a.ndim < 2:
        raise ShapeError(
            f"{name}: expected (..., m, n), got {tuple(a.shape)}. "
            "Vectors belong to the rest group; make a matrix of one with a[:, None] or a[None, :]."
        )
    if square and a.shape[-1] != a.shape[-2]:
        raise ShapeError(
            f"{name}: expected square matrices (..., n, n), got {tuple(a.shape)}. "
            "Pass a Gram matrix, such as gm.linalg.syrk(a)."
        )
    return a


def choose(name: str, method: str, family: Mapping[str, object]) -> None:
    """Refuse a method that the family does not have, listing those it has."""
    if method != "auto" and method not in family:
        raise InputError(f"{name}: unknown method {method!r}. Use one of: auto, {', '.join(family)}.")


def pow2(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly, for −1022 ≤ exponent ≤ 1023 (torch.exp2 may be one rounding off)."""
    return ((exponent.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def scale(x: Tensor, exponent: Tensor) -> Tensor:
    """x · 2^exponent in two halves, so that 2^±2000 is no overflow in itself."""
    half = exponent // 2
    tail = (1,) * (x.ndim - exponent.ndim)
    return x * pow2(half).reshape(*exponent.shape, *tail) * pow2(exponent - half).reshape(*exponent.shape, *tail)


def exponent_of(x: Tensor, *, multiple: int = 1) -> Tensor:
    """The least e, a multiple of `multiple`, with every |x| < 2^e in each matrix; 0 for a zero or empty matrix."""
    peak = x.abs().flatten(1).amax(1) if x[0:1].numel() else x.new_zeros(x.shape[0])
    e = torch.frexp(peak).exponent.long()
    return -((-e) // multiple) * multiple


def load(a: Tensor, *, multiple: int = 1, at_least: Tensor | None = None) -> Batch:
    """Flatten the batch, replace non-finite matrices by the identity, and scale by a power of two.

    `multiple` makes the exponent divisible by p, so that p-th roots scale exactly; `at_least` (B,) is a magnitude, such
    as the damping, that must not overflow once scaled.
    """
    m, n = a.shape[-2:]
    x = a.detach().to(torch.float64).reshape(math.prod(a.shape[:-2]), m, n)
    finite = x.isfinite().flatten(1).all(1) if x.numel() else torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    x = torch.where(finite[:, None, None], x, torch.eye(m, n, dtype=x.dtype, device=x.device))
    exponent = exponent_of(x, multiple=multiple)
    if at_least is not None:
        nonzero = x.abs().flatten(1).amax(1) > 0 if x[0:1].numel() else finite
        other = exponent_of(at_least[:, None], multiple=multiple)
        exponent = torch.where(
            nonzero & (at_least <= 0), exponent, torch.where(nonzero, exponent.maximum(other), other)
        )
    return Batch(scale(x, -exponent), exponent, finite, a.shape[:-2], a.dtype)


def select(x: object, keep: Tensor) -> object:
    """Rows `keep` of every tensor, others unchanged."""
    return x[keep] if isinstance(x, Tensor) and x.ndim > 0 else x


def norm(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix."""
    return x.flatten(1).norm(dim=1)


def settle(
    batch: Batch, answer: Answer, exponent: Tensor, code: int, methods: Sequence[str], rtol: float
) -> tuple[Tensor, Certificate]:
    """Scale the value back, round it to the caller's dtype, measure that rounding, and certify (flat batch)."""
    value = answer.value
    failed = ~batch.finite
    out = scale(value, exponent).to(batch.dtype)
    rounding = norm(scale(out.to(torch.float64), -exponent) - value)
    size = norm(value)
    # The error is relative to the exact answer, which may be smaller than ours by the error itself.
    bound = (rounding + answer.error) / (size - answer.error).clamp_min(0)
    bound = torch.where((rounding == 0) & (answer.error == 0), 0.0, bound).nan_to_num(nan=math.inf, posinf=math.inf)
    bound = bound * (1 + 64 * 2.0**-53)  # the norms above are rounded too
    reason = torch.where(failed, cert.NOT_FINITE, answer.reason)
    bound = torch.where((reason != cert.NONE) & (reason != cert.INACCURATE), math.inf, bound)
    converged = (reason == cert.NONE) & (bound <= rtol)
    reason = torch.where((reason == cert.NONE) & ~converged, cert.INACCURATE, reason)
    out = torch.where(failed.reshape((-1,) + (1,) * (out.ndim - 1)), math.nan, out)
    certificate = Certificate(
        converged=converged,
        residual=torch.where(failed, math.nan, answer.residual),
        error_bound=bound,
        kind=torch.zeros_like(reason),
        failure_probability=torch.zeros_like(bound),
        steps=torch.full_like(reason, answer.steps),
        method=torch.full_like(reason, code),
        reason=reason,
        methods=tuple(methods),
    )
    return out, certificate


def climb(
    batch: Batch,
    family: Mapping[str, Route],
    names: Sequence[str],
    rtol: float,
    exponent: Callable[[Tensor], Tensor],
    **arguments: object,
) -> tuple[Tensor, Certificate]:
    """Run the first route on every matrix, and each next one on those that still fail and might not.

    `exponent` gives the answer's power of two from the input's. One wait for the device per escalation.
    """
    methods = tuple(family)
    rows, value, certificate = None, None, None
    for name in names:
        part = batch if rows is None else replace(batch, **{k: select(getattr(batch, k), rows) for k in _TENSORS})
        chosen = arguments if rows is None else {k: select(v, rows) for k, v in arguments.items()}
        answer = family[name](part.x, **chosen)
        found, proof = settle(part, answer, exponent(part.exponent), methods.index(name), methods, rtol)
        if value is None or certificate is None or rows is None:
            value, certificate = found, proof
        else:
            better = proof.converged | ~(proof.error_bound > certificate.error_bound[rows])
            kept = rows[better]
            value[kept] = found[better]
            for field in _PROOF:
                getattr(certificate, field)[kept] = getattr(proof, field)[better]
        if name == names[-1] or not value.shape[0]:
            break
        again = (certificate.reason == cert.INACCURATE) | (certificate.reason == cert.SINGULAR)
        rows = again.nonzero().flatten()
        if not rows.numel():
            break
    assert value is not None
    assert certificate is not None
    shaped = {field: getattr(certificate, field).reshape(batch.shape) for field in _PROOF}
    return value.reshape(batch.shape + value.shape[1:]), replace(certificate, **shaped)


_TENSORS = ("x", "exponent", "finite")
_PROOF = tuple(f.name for f in fields(Certificate) if f.name != "methods")
