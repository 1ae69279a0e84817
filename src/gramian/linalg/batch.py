"""From what the caller gave to a batch of finite, scaled matrices, and back with a certificate.

LAPACK raises for, or poisons, a whole batch when one matrix holds NaN, and overflows on products of large entries. So
non-finite matrices are replaced by the identity and marked, and every matrix is scaled by a power of two, which rounds
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gramian.errors import DtypeError, InputError, ShapeError
from gramian.linalg import certificate as cert
from gramian.linalg.certificate import Certificate
from gramian.linalg.cost import Parts, predict

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

SMALL = 32
"""Smaller side up to which a route in float32 saves nothing worth its error."""


@dataclass(frozen=True)
class Batch:
    """Matrices flattened to (B, m, n) as they came, with the powers of two and the marks that make them workable.

    `at(dtype)` gives raw · 2^-down, finite and with entries below 1, which stands for the original · 2^-exponent.
    """

    raw: Tensor
    down: Tensor
    exponent: Tensor
    finite: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def at(self, work: torch.dtype | None) -> Tensor:
        """The scaled batch, in its own dtype, widened to float32 at least, if None.

        In float32 entries 2^-126 times smaller than the largest lose bits; in float64 none do.
        """
        x = self.raw
        work = work or torch.promote_types(self.dtype, torch.float32)
        if self.raw.device.type != "cpu" or not bool(self.finite.all()):
            eye = torch.eye(*x.shape[1:], dtype=x.dtype, device=x.device)
            x = torch.where(self.finite[:, None, None], x, eye)
        # What float64 holds and float32 may not is scaled first; the other way round, it is widened first.
        return scale(x, -self.down).to(work) if x.dtype == torch.float64 else scale(x.to(work), -self.down)

    @cached_property
    def x(self) -> Tensor:
        """The scaled batch in float64, exact."""
        return self.at(torch.float64)


@dataclass(frozen=True)
class Answer:
    """What a route found: the value, a bound on its absolute Frobenius error, its residual, why it failed.

    `failure` is the probability that the error is above its bound: 0 where it is proven, NaN where nobody knows; `size`
    the Frobenius norm of the exact answer where it is known beforehand.
    """

    value: Tensor
    error: Tensor
    residual: Tensor
    reason: Tensor
    steps: int = 0
    failure: float = 0.0
    size: Tensor | None = None


@dataclass(frozen=True)
class Route:
    """One row of a family's table, whose rows are in order of accuracy.

    `work` is the dtype in which the function wants its matrices (None: their own); `finest` the least rtol at which it
    is worth a try; `parts` what it is made of, for `cost.predict`, from the shape (m, n); `narrow` that it owes its
    speed to float32, which matrices of up to `SMALL` do not notice.
    """

    run: Callable[..., Any]
    work: torch.dtype | None
    finest: float
    parts: Callable[[int, int], Parts]
    narrow: bool = False


def declined(x: Tensor) -> Answer:
    """The answer, zero, of a route that sees before its main work that it cannot reach what was asked."""
    nothing = torch.full(x.shape[:1], math.inf, dtype=torch.float64, device=x.device)
    reason = torch.full(x.shape[:1], cert.INACCURATE, dtype=torch.long, device=x.device)
    return Answer(torch.zeros_like(x), nothing, torch.full_like(nothing, math.nan), reason)


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
    """x · 2^exponent, also where 2^exponent itself is not finite: in two halves, unless one or none will do."""
    tail = (1,) * (x.ndim - exponent.ndim)
    half = exponent // 2
    factors = [half, exponent - half]
    if x.device.type == "cpu" and exponent.numel():
        reach = int(exponent.abs().amax())
        factors = [] if reach == 0 else [exponent] if reach < -math.log2(torch.finfo(x.dtype).tiny) else factors
    for e in factors:
        x = x * pow2(e).to(x.dtype).reshape(*e.shape, *tail)
    return x


def exponent_of(x: Tensor, *, multiple: int = 1) -> Tensor:
    """The least e, a multiple of `multiple`, with every |x| < 2^e in each matrix; 0 for a zero or empty matrix."""
    return _exponent(_peak(x), multiple)


def _peak(x: Tensor) -> Tensor:
    """The largest |entry| of each matrix in float64; NaN if there is one."""
    if not x[0:1].numel():
        return x.new_zeros(x.shape[0], dtype=torch.float64)
    dims = tuple(range(1, x.ndim))
    return torch.maximum(x.amax(dims), -x.amin(dims)).to(torch.float64)


def _exponent(peak: Tensor, multiple: int) -> Tensor:
    e = torch.frexp(peak).exponent.long()
    return -((-e) // multiple) * multiple


def load(a: Tensor, *, multiple: int = 1, at_least: Tensor | None = None) -> Batch:
    """Flatten the batch, find which matrices are finite, and the power of two to scale each by.

    `multiple` makes the exponent divisible by p, so that p-th roots scale exactly; `at_least` (B,) is a magnitude, such
    as the damping, that must not overflow once scaled.
    """
    m, n = a.shape[-2:]
    x = a.detach().reshape(math.prod(a.shape[:-2]), m, n)
    peak = _peak(x)
    finite = peak.isfinite()
    peak = torch.where(finite, peak, 1.0)
    exponent = _exponent(peak, multiple)
    if at_least is not None:
        nonzero = peak > 0 if x[0:1].numel() else finite
        other = exponent_of(at_least[:, None], multiple=multiple)
        exponent = torch.where(
            nonzero & (at_least <= 0), exponent, torch.where(nonzero, exponent.maximum(other), other)
        )
    return Batch(x, exponent, exponent, finite, a.shape[:-2], a.dtype)


def unscaled(batch: Batch, *, reach: int = 24) -> Batch:
    """The batch at its own scale where every exponent is within `reach`, so that no copy is made of it."""
    if batch.exponent.numel() and int(batch.exponent.abs().amax()) > reach:
        return batch
    return replace(batch, down=torch.zeros_like(batch.down), exponent=torch.zeros_like(batch.exponent))


def select(x: object, keep: Tensor) -> object:
    """Rows `keep` of every tensor, others unchanged."""
    return x[keep] if isinstance(x, Tensor) and x.ndim > 0 else x


def norm(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix, in float64."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), dtype=wide)


def settle(
    batch: Batch, answer: Answer, exponent: Tensor, code: int, methods: Sequence[str], rtol: float
) -> tuple[Tensor, Certificate]:
    """Scale the value back, round it to the caller's dtype, measure that rounding, and certify (flat batch)."""
    value = answer.value
    failed = ~batch.finite
    out = scale(value, exponent).to(batch.dtype)
    same = value.dtype == batch.dtype and value.device.type == "cpu"
    if out is value or (same and torch.equal(scale(out, -exponent), value)):
        rounding = torch.zeros_like(answer.error)
    else:
        back = scale(out.to(torch.float64), -exponent)
        rounding = norm(back - value)
    # The error is relative to the exact answer, which may be smaller than ours by the error itself.
    size = norm(value) - answer.error if answer.size is None else answer.size
    bound = (rounding + answer.error) / size.clamp_min(0)
    bound = torch.where((rounding == 0) & (answer.error == 0), 0.0, bound).nan_to_num(nan=math.inf, posinf=math.inf)
    bound = bound * (1 + 64 * 2.0**-53)  # the norms above are rounded too
    reason = torch.where(failed, cert.NOT_FINITE, answer.reason)
    bound = torch.where((reason != cert.NONE) & (reason != cert.INACCURATE), math.inf, bound)
    converged = (reason == cert.NONE) & (bound <= rtol)
    reason = torch.where((reason == cert.NONE) & ~converged, cert.INACCURATE, reason)
    if not same or bool(failed.any()):
        out = torch.where(failed.reshape((-1,) + (1,) * (out.ndim - 1)), math.nan, out)
    certificate = Certificate(
        converged=converged,
        residual=torch.where(failed, math.nan, answer.residual),
        error_bound=bound,
        kind=torch.full_like(reason, int(answer.failure != 0)),
        failure_probability=torch.full_like(bound, answer.failure),
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

    `exponent` gives the answer's power of two from the input's. A route that is followed by another gets `decline`, the
    rtol above which it need not finish. One wait for the device per escalation.
    """
    methods = tuple(family)
    rows, value, certificate = None, None, None
    for name in names:
        part = batch if rows is None else replace(batch, **{k: select(getattr(batch, k), rows) for k in _TENSORS})
        chosen = arguments if rows is None else {k: select(v, rows) for k, v in arguments.items()}
        decline = math.inf if name == names[-1] else rtol
        answer = family[name].run(part.at(family[name].work), decline=decline, **chosen)
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
        if rows.numel() == value.shape[0] and not bool(certificate.error_bound.isfinite().any()):
            rows = None  # nothing to keep: no need to pick and to put back
    assert value is not None
    assert certificate is not None
    shaped = {field: getattr(certificate, field).reshape(batch.shape) for field in _PROOF}
    return value.reshape(batch.shape + value.shape[1:]), replace(certificate, **shaped)


def ladder(family: Mapping[str, Route], shape: Sequence[int], rtol: float, device: str) -> list[str]:
    """The routes worth trying in turn on (..., m, n): by predicted cost, each more accurate than the one before.

    Rows stand in the family's table in order of accuracy; the last is always the last resort. A route that is to be
    tried before a more accurate one has to cost less than 0.8 of it.
    """
    small = min(shape[-2:]) <= SMALL
    rows = [(name, row) for name, row in family.items() if rtol >= row.finest and not (small and row.narrow)]
    rows = rows or list(family.items())[-1:]
    batch, (m, n) = math.prod(shape[:-2]), shape[-2:]
    names: list[str] = []
    least = math.inf
    for name, row in reversed(rows):
        seconds = predict(row.parts(m, max(n, 1)), min(m, n), max(batch, 1), device)
        if not names or seconds < 0.8 * least:
            names.insert(0, name)
            least = min(least, seconds)
    return names


_TENSORS = ("raw", "down", "exponent", "finite")
_PROOF = tuple(f.name for f in fields(Certificate) if f.name != "methods")
