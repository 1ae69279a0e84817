"""Methods from cheap to certain: which to try, how to run them in turn, and how an answer gets its certificate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg.certificate import Certificate, uncertified, verdict
from gramian.linalg.engine.cost import Operations, constants, predict
from gramian.linalg.engine.loading import Loaded
from gramian.linalg.engine.rounding import LOOSE, norm, unit_roundoff
from gramian.linalg.engine.scaling import largest_entry, scale
from gramian.linalg.engine.spectrum import Spectrum

SMALL = 32
"""Smaller side up to which a method in float32 saves nothing worth its error."""

MANY = 1 << 16
"""Entries of a value from which its rounding to the caller's dtype is bounded by their norm, not measured."""


@dataclass(frozen=True)
class Answer:
    """What a method found for matrices (B, ...), at the scale on which it got them.

    Attributes:
        value: `(B, ...)`, the answer.
        error: `(B,)`, a bound on its absolute Frobenius error; inf where nothing is proven.
        residual: `(B,)`, how far it is from satisfying its defining equation.
        reason: `(B,)`, why it failed, `certificate.NONE` where it did not.
        steps: the iterations taken.
        failure: the probability that the error is above its bound: 0 where the bound is proven, NaN where unknown.
        size: `(B,)`, the Frobenius norm of the exact answer, where it is known beforehand.
        spectrum: eigenvalues and vectors of the value, or of H for a polar factor U with A = UH, if the method has them
            and they are as accurate as the value.
    """

    value: Tensor
    error: Tensor
    residual: Tensor
    reason: Tensor
    steps: int = 0
    failure: float = 0.0
    size: Tensor | None = None
    spectrum: Spectrum | None = None

    @staticmethod
    def bare(value: Tensor, reason: Tensor | None = None, steps: int = 0, spectrum: Spectrum | None = None) -> Answer:
        """An answer without a certificate; the reason says what the method saw on its way."""
        none = torch.zeros(value.shape[0], dtype=torch.long, device=value.device) if reason is None else reason
        unknown = torch.full(none.shape, math.inf, dtype=torch.float64, device=value.device)
        return Answer(value, unknown, unknown * math.nan, none, steps, math.nan, spectrum=spectrum)


@dataclass(frozen=True)
class Method:
    """One row of a matrix function's table of methods, which stand in order of accuracy.

    Attributes:
        run: from scaled, finite matrices `(B, m, n)` to an `Answer`; None if it declines. See `function`. With a
            parameter `certify` it is asked for `Answer.bare` where no certificate is wanted, and with `dtype` it gets
            the caller's.
        work: the dtype in which it takes its matrices; None: their own, at least float32.
        finest: the least rtol at which it is worth a try.
        operations: what it consists of, for `cost.predict`, from the shape `(m, n)`, m ≥ n.
        purpose: what it is for, for the docs.
        narrow: whether its speed comes from float32, which saves nothing up to a smaller side of `SMALL`.
        symmetric: whether it works only on matrices that are symmetric to the last bit.
        spectral: whether its answer has a spectrum, which spares the derivative an eigendecomposition.
    """

    run: Callable[..., Answer | None]
    work: torch.dtype | None
    finest: float
    operations: Callable[[int, int], Operations]
    purpose: str
    narrow: bool = False
    symmetric: bool = False
    spectral: bool = False

    def answer(self, x: Tensor, *, certify: bool, dtype: torch.dtype, **options: Any) -> Answer | None:
        """What `run` finds, told whether to certify it and for which dtype if it has such parameters."""
        names = _parameters(self.run)
        if not certify and "certify" in names:
            options["certify"] = False
        if "dtype" in names:
            options["dtype"] = dtype
        return self.run(x, **options)


@lru_cache(maxsize=256)
def _parameters(run: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(run).parameters)


def ladder(methods: Mapping[str, Method], shape: Sequence[int], rtol: float, device: str) -> list[str]:
    """The methods worth trying in turn on (..., m, n): by predicted cost, each more accurate than the one before.

    The last is always the last resort, that of the table's last row. A method is tried before a more accurate one only
    if it costs less than 0.8 of it.
    """
    small = min(shape[-2:]) <= SMALL
    rows = [(name, row) for name, row in methods.items() if rtol >= row.finest and not (small and row.narrow)]
    rows = rows or list(methods.items())[-1:]
    if len(rows) == 1:
        return [rows[0][0]]
    batch, (short, long) = max(math.prod(shape[:-2]), 1), sorted(shape[-2:])
    operations = {name: row.operations(long, max(short, 1)) for name, row in rows}
    c = constants(device, tuple(operations.values()), short, batch)
    names: list[str] = []
    least = math.inf
    for name, _ in reversed(rows):
        seconds = predict(operations[name], short, batch, c)
        if not names or seconds < 0.8 * least:
            names.insert(0, name)
            least = min(least, seconds)
    return names


AGAIN = (cert.INACCURATE, cert.SINGULAR, cert.OVERFLOW, cert.UNDERFLOW, cert.NO_SIGN, cert.ON_CUT)
"""Failures by one method that may be none by the next."""

Rung = TypeVar("Rung")
Values = tuple[Tensor, ...]


def climb(
    rungs: Sequence[Rung], attempt: Callable[[Rung, Tensor | None, bool], tuple[Values, Certificate] | None]
) -> tuple[Values, Certificate]:
    """Run the first rung on all matrices, and each next one on those that failed and might not fail there.

    `attempt(rung, rows, last)` runs a rung on the matrices with the indices `rows` (None: all) and returns their values
    and certificate, or None if it declines, which the last rung must not. Of two answers for a matrix the one that
    converged is kept, or the one with the lower bound. The device is synchronized once per escalation.
    """
    rows: Tensor | None = None
    values: Values = ()
    certificate: Certificate | None = None
    for i, rung in enumerate(rungs):
        last = i == len(rungs) - 1
        answer = attempt(rung, rows, last)
        if answer is None:
            continue
        found, proof = answer
        if certificate is None or rows is None:
            values, certificate = found, proof
        else:
            better = proof.converged | ~(proof.error_bound > certificate.error_bound[rows])
            # A later method that finds nothing does not take back that there is nothing to find.
            better = better & ~(_on_axis(certificate.reason[rows]) & (proof.reason == cert.INACCURATE))
            kept = rows[better]
            for whole, part in zip((*values, *certificate.tensors()), (*found, *proof.tensors()), strict=True):
                whole[kept] = part[better]
        if last or (certificate.converged.device.type == "cpu" and bool(certificate.converged.all())):
            break
        # What overflows by a cheap method may just fit by a finer one, what underflows be zero, and eigenvalues near an
        # axis be off it.
        reason = certificate.reason
        again = torch.isin(reason, reason.new_tensor(AGAIN))
        rows = again.nonzero().flatten()
        if not rows.numel():
            break
        if rows.numel() == again.numel() and not bool((certificate.error_bound.isfinite() | _on_axis(reason)).any()):
            rows = None  # nothing to keep: no need to pick rows and put them back
    assert certificate is not None
    return values, certificate


def _on_axis(reason: Tensor) -> Tensor:
    return (reason == cert.NO_SIGN) | (reason == cert.ON_CUT)


def settle(
    loaded: Loaded,
    answer: Answer,
    exponent: Tensor | None,
    *,
    code: int,
    methods: Sequence[str],
    rtol: float,
    certify: bool = True,
) -> tuple[Tensor, Certificate]:
    """The value times 2^exponent (None: as it is) in the caller's dtype, and a certificate that includes that rounding.

    It is NaN where the matrix was not finite.
    """
    value = answer.value
    out = (value if exponent is None else scale(value, exponent)).to(loaded.dtype)
    if not certify:
        return _bare(loaded, out, answer, code, methods)
    same = value.dtype == loaded.dtype and value.device.type == "cpu"
    size = norm(value)
    if out is value:
        rounding = torch.zeros_like(answer.error)
    elif value[0:1].numel() >= MANY:
        # An entry is off by one rounding, or by one of the least numbers: about twice what it would be found to be. A
        # power of two alone rounds only to these.
        u, count = unit_roundoff(loaded.dtype), math.sqrt(value[0].numel())
        least = torch.full_like(size, 0.5 * torch.finfo(loaded.dtype).smallest_normal * 2 * u)
        rounding = count * (least if exponent is None else scale(least, -exponent))
        rounding = rounding if same else rounding + u * size * (1 + LOOSE)
        # No entry is above the norm, and few answers are near the largest number.
        top = size if exponent is None else scale(size, exponent)
        if value.device.type != "cpu" or not bool((top < torch.finfo(loaded.dtype).max / 2).all()):
            rounding = torch.where(largest_entry(out).isfinite(), rounding, math.inf)
    elif same and torch.equal(out if exponent is None else scale(out, -exponent), value):
        rounding = torch.zeros_like(answer.error)
    else:
        wide = out.to(torch.float64)
        rounding = norm((wide if exponent is None else scale(wide, -exponent)) - value)
    # The error is relative to the exact answer, which may be smaller than ours by the error itself.
    size = size - answer.error if answer.size is None else answer.size
    bound = (rounding + answer.error) / size.clamp_min(0)
    bound = torch.where((rounding == 0) & (answer.error == 0), 0.0, bound)
    bound = bound * (1 + (2 * LOOSE if value.dtype == torch.float32 else 64 * 2.0**-53))  # the norms are rounded too
    bound = torch.where(size == math.inf, math.inf, bound)  # where the norm overflows, nothing is known
    # A value that holds inf or NaN itself gives a rounding of NaN.
    overflow = (answer.reason == cert.NONE) & (rounding == math.inf) & answer.error.isfinite()
    reason = torch.where(overflow, cert.OVERFLOW, answer.reason)
    missed = (reason == cert.NONE) & ~(bound <= rtol)
    if value.device.type != "cpu" or bool(missed.any()):
        # Both the error and the answer are nothing beside the least normal number.
        tiny = torch.finfo(loaded.dtype).tiny
        error = answer.error if exponent is None else scale(answer.error, exponent)
        reason = torch.where(missed & (largest_entry(out) < tiny) & (error < tiny), cert.UNDERFLOW, reason)
    if loaded.asymmetric is not None:
        reason = torch.where(loaded.asymmetric, cert.NOT_SYMMETRIC, reason)
    if not loaded.ordinary:
        reason = torch.where(loaded.finite, reason, cert.NOT_FINITE)
        out = torch.where(loaded.finite.reshape((-1,) + (1,) * (out.ndim - 1)), out, math.nan)
    return out, verdict(
        bound,
        rtol,
        reason,
        methods=methods,
        code=code,
        residual=answer.residual,
        steps=answer.steps,
        failure_probability=answer.failure,
    )


def _bare(loaded: Loaded, out: Tensor, answer: Answer, code: int, methods: Sequence[str]) -> tuple[Tensor, Certificate]:
    """The value, NaN where the matrix was not finite, and a certificate that says only what was seen to fail."""
    reason = torch.where(answer.reason == cert.NONE, cert.UNASKED, answer.reason)
    if loaded.asymmetric is not None:
        reason = torch.where(loaded.asymmetric, cert.NOT_SYMMETRIC, reason)
    if not loaded.ordinary:
        out = torch.where(loaded.finite.reshape((-1,) + (1,) * (out.ndim - 1)), out, math.nan)
        reason = torch.where(loaded.finite, reason, cert.NOT_FINITE)
    proof = uncertified(reason.shape, reason.device, methods=methods, code=code, steps=answer.steps)
    return out, replace(proof, reason=reason)


class Number(NamedTuple):
    """A number for each matrix (B,), a bound on its absolute error, why it failed, and steps.

    `failure_probability` is None for a bound, and NaN for an estimate whose probability is unknown.
    """

    value: Tensor
    error: Tensor
    reason: Tensor
    steps: int = 0
    failure_probability: float | None = None


def numbers(
    methods: Mapping[str, Callable[..., Number]],
    names: Sequence[str],
    rtol: float,
    dtype: torch.dtype,
    x: Tensor,
    finite: Tensor,
    shape: Sequence[int],
    back: Callable[[Tensor, Tensor], Tensor],
    *,
    certify: bool = True,
    **options: Any,
) -> tuple[Tensor, Certificate]:
    """The numbers of the finite matrices of x (B, m, n), by the methods `names` in turn; NaN for the others.

    `back` restores the scale of values, given the indices of their matrices. Without `certify` the methods get
    `certify=False`, and the first one's values are taken but where it sees that it failed.
    """
    chosen = finite.nonzero().flatten()
    every = chosen.numel() == finite.numel()

    if not certify:
        options["certify"] = False
    # Rounding the answer to `dtype` adds to its error, and a method must leave room for it.
    asked = rtol - min(rtol, torch.finfo(dtype).eps) / 2

    def attempt(name: str, rows: Tensor | None, last: bool) -> tuple[Values, Certificate]:
        index = chosen if rows is None else chosen[rows]
        found = methods[name](x if every and rows is None else x[index], rtol=asked, **options)
        out = back(found.value, index)
        if not certify:
            code = list(methods).index(name)
            proof = uncertified(out.shape, out.device, methods=tuple(methods), code=code, steps=found.steps)
            return (out.to(dtype),), replace(
                proof, reason=torch.where(found.reason == cert.NONE, cert.UNASKED, found.reason)
            )
        rounded = out.to(dtype).to(torch.float64)
        # What comes back as a subnormal number is rounded by that. (A number over a tensor is its product with the
        # reciprocal, which overflows.)
        tiny = torch.full_like(out, 2.0**-1074) / out.abs()
        lost = torch.where((out.abs() < 2.0**-1021) & (found.value != 0), tiny, 0.0)
        exact = (out == rounded) & (lost == 0)
        rounding = torch.where(out == rounded, 0.0, (out - rounded).abs() / out.abs()) + lost
        bound = found.error / (found.value.abs() - found.error).clamp_min(0) + rounding
        bound = torch.where((found.error == 0) & exact, 0.0, bound)
        overflow = (found.reason == cert.NONE) & rounded.isinf() & out.isfinite() & found.error.isfinite()
        return (out.to(dtype),), verdict(
            bound,
            rtol,
            torch.where(overflow, cert.OVERFLOW, found.reason),
            methods=tuple(methods),
            code=list(methods).index(name),
            steps=found.steps,
            failure_probability=found.failure_probability,
        )

    reason = torch.where(finite, cert.NONE, cert.NOT_FINITE)
    value = torch.full(finite.shape, math.nan, dtype=dtype, device=x.device)
    certificate = verdict(torch.zeros_like(reason), rtol, reason, methods=tuple(methods), code=0)
    if chosen.numel():
        (found,), proof = climb(names, attempt)
        for whole, part in zip((value, *certificate.tensors()), (found, *proof.tensors()), strict=True):
            whole[chosen] = part
    return value.reshape(tuple(shape)), certificate.reshape(shape)
