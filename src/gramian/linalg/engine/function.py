"""The rule for a matrix function: its row says all that the engine, the tests, the bench and the docs need.

A file of a matrix function has its methods, one `MatrixFunction` and two public functions, and `linalg/__init__.py`
imports it. Checking, scaling, the choice of methods, escalation and certificates are then `evaluate`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from gramian.linalg.certificate import Certificate, default_rtol
from gramian.linalg.engine.escalation import Method, Values, climb, ladder, settle
from gramian.linalg.engine.loading import (
    Damping,
    Loaded,
    check,
    choose,
    damping_of,
    equals_transpose,
    load,
    symmetric_part,
    unscaled,
)
from gramian.linalg.engine.scaling import scale
from gramian.linalg.engine.spectrum import Spectrum, kept, usable

Domain = Literal["general", "square", "symmetric", "semidefinite", "definite"]
Degree = Fraction | int | Literal["by exponent", "unscaled"]
Options = Callable[[Tensor], Mapping[str, Any]]

FUNCTIONS: dict[str, MatrixFunction] = {}
"""Every matrix function by name, entered by `register`."""


@dataclass(frozen=True)
class MatrixFunction:
    """One matrix function.

    Attributes:
        name: the public function; `name_ex` returns the certificate too.
        methods: its methods in order of accuracy. Each is called as `run(x, *, rtol, **arguments)` with x `(B, m,
            n)` finite and, unless the function is unscaled, with entries below 1. If it sees early that its error will
            be above `rtol`, it declines: it returns None, and the next method is tried. The last method gets rtol=inf
            and must answer. The arguments are those of `evaluate`, `shift` (B,), the damping on the scale of x, where
            the function takes damping, and `dtype`, the caller's, if there is such a parameter. One with a parameter
            `certify` gets `certify=False` where no certificate is wanted, and answers with `Answer.bare`.
        domain: the matrices for which the function is defined:

            - "general": any (m, n). If m < n, the methods get the transpose, and a value that is a matrix is transposed
              back.
            - "square": any (n, n).
            - "symmetric": symmetric, with eigenvalues of any sign; negative ones are like any others.
            - "semidefinite": symmetric, with eigenvalues ≥ 0. Negative ones up to 10·n·ε(dtype)·‖M‖ are rounding and
              count as zero; with one beyond that, the value does not exist.
            - "definite": symmetric, with eigenvalues > 0. With a zero or negative one, the value does not exist.

            In the three symmetric domains the methods get the symmetric part, and a matrix that is not symmetric up to
            rounding fails. The methods themselves look at the signs: `symmetric_eigen.decompose` gives the reason
            `INDEFINITE`, which a function of domain "symmetric" replaces by `NONE`.
        degree: how the value follows the scale. A number k: f(cX) = cᵏ f(X), as for the inverse, k = −1. "by exponent":
            in another way, as for the logarithm; the methods get the integers `exponent` (B,) and answer for
            2^exponent · X. (Use `scaling.scale`, or cast them to float64: times a Python float they are float32.)
            "unscaled": the methods get the matrices at their own scale.
        plain: the function by plain LAPACK, for one matrix or a batch, without a certificate: the peer in tests and in
            the bench.
        exact: the value in mpmath, which the tests compare with. For symmetric domains it takes one eigenvalue and
            returns the function of it: `exact(mpmath, eigenvalue, **options)`. For the others it takes the whole
            matrix: `exact(mpmath, matrix, **options)`. It returns None if the value does not exist.
        examples: name of an example: its options from the matrix, for tests and bench.
        damped: whether it takes damping.
    """

    name: str
    methods: Mapping[str, Method]
    domain: Domain
    degree: Degree | Callable[..., Degree]
    plain: Callable[..., Tensor]
    exact: Callable[..., Any]
    examples: Mapping[str, Options] = field(default_factory=dict)
    damped: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether it is a function of symmetric matrices."""
        return self.domain in ("symmetric", "semidefinite", "definite")


def register(function: MatrixFunction) -> MatrixFunction:
    """Enter a function in `FUNCTIONS`: the tests, `gramian bench linalg` and the docs take it from there."""
    assert function.name not in FUNCTIONS, function.name
    FUNCTIONS[function.name] = function
    return function


def of_eigenvalues(mp: Any, m: Any, f: Callable[[Any], Any]) -> Any:
    """V f(Λ) V⁻¹ in mpmath for M = VΛV⁻¹; None where f gives None for an eigenvalue.

    A matrix without a basis of eigenvectors is moved by 1e-90, which gives it one, of κ of about 1e90.
    """
    for digits, moved in ((80, 0), (250, mp.mpf(10) ** -90 * mp.norm(m))):
        with mp.workdps(digits):
            n = m.rows
            w, v = mp.eig(m + moved * mp.matrix([[(7 * i + 3 * j) % 11 for j in range(n)] for i in range(n)]))
            values = [f(x) for x in w]
            if any(y is None for y in values):
                return None
            try:
                inverse = v**-1
            except (ZeroDivisionError, TypeError):  # a zero pivot
                continue
            # The digits that a matrix far from normal loses.
            if mp.norm(v) * mp.norm(inverse) < mp.mpf(10) ** (digits // 2 - 10):
                return (v * mp.diag(values) * inverse).apply(mp.re)
    return None


def examples() -> Iterator[tuple[str, str, Options]]:
    """Each example of each registered function: its own name, the function's, and its options from the matrix."""
    for name, function in FUNCTIONS.items():
        for label, options in (function.examples or {name: lambda a: {}}).items():
            yield label, name, options


def methods_table() -> str:
    """The methods of every registered function and what they are for, as a Markdown table for the docs."""
    lines = ["| function | methods, in order of accuracy | for |", "|-|-|-|"]
    for name, function in FUNCTIONS.items():
        for i, (method, row) in enumerate(function.methods.items()):
            lines.append(f"| {f'`{name}`' if i == 0 else ''} | `{method}` | {row.purpose} |")
    return "\n".join(lines)


def evaluate(
    function: MatrixFunction,
    a: Tensor,
    *,
    method: str,
    rtol: float | None,
    damping: Damping | None = None,
    right: Loaded | None = None,
    certify: bool = True,
    **options: Any,
) -> tuple[Tensor, Certificate]:
    """The function of each matrix of a (..., m, n), with its certificate.

    `right` is a right-hand side B in which the value is linear: the methods get `b`, scaled by itself. Without
    `certify` the value is that of the first method that neither declines nor sees itself fail, and nothing is known of
    its error.
    """
    name = function.name
    check(name, a, square=function.domain != "general")
    choose(name, method, function.methods)
    tolerance = default_rtol(rtol, a.dtype)
    wide = function.domain == "general" and a.shape[-2] < a.shape[-1]
    a = a.mT if wide else a
    degree = function.degree
    degree = degree(**options) if callable(degree) else degree
    shift = None if damping is None else damping_of(name, damping, a)
    loaded = load(a, multiple=degree.denominator if isinstance(degree, int | Fraction) else 1, at_least=shift)
    if degree == "unscaled":
        loaded = unscaled(loaded, within=float("inf"))
    if function.symmetric:
        loaded = symmetric_part(a, loaded)
    if shift is not None:
        options["shift"] = scale(shift, -loaded.exponent)
    if degree == "by exponent":
        options["exponent"] = loaded.exponent
    names = [method] if method != "auto" else _ladder(function, a, tolerance)
    exponent = None
    if isinstance(degree, int | Fraction) and degree:
        exponent = loaded.exponent * degree.numerator // degree.denominator
    if right is not None:
        loaded = replace(loaded, finite=loaded.finite & right.finite)
        exponent = right.exponent if exponent is None else exponent + right.exponent
        options["b"] = right.x
    value, certificate = _run(function, names, loaded, exponent, tolerance, certify, options)
    return (value.mT if wide and value.ndim == a.ndim else value), certificate


def _ladder(function: MatrixFunction, a: Tensor, rtol: float) -> list[str]:
    """`ladder`, without the methods for symmetric matrices where a is none."""
    methods = function.methods
    if any(row.symmetric for row in methods.values()) and not (a.device.type != "cpu" or equals_transpose(a)):
        methods = {name: row for name, row in methods.items() if not row.symmetric}
    return ladder(methods, a.shape, rtol, a.device.type)


def _run(
    function: MatrixFunction,
    names: list[str],
    loaded: Loaded,
    exponent: Tensor | None,
    rtol: float,
    certify: bool,
    options: Mapping[str, Any],
) -> tuple[Tensor, Certificate]:
    """The methods `names` in turn on loaded matrices, whose values are scaled by 2^exponent (None: not at all)."""
    methods, keep = tuple(function.methods), kept()
    spectral = any(function.methods[name].spectral for name in names)

    def attempt(name: str, rows: Tensor | None, last: bool) -> tuple[Values, Certificate] | None:
        part = loaded.rows(rows)
        chosen = options if rows is None else {k: _rows(v, rows) for k, v in options.items()}
        row = function.methods[name]
        asked = float("inf") if last else rtol
        x = part.x if row.work == torch.float64 else part.at(row.work)  # widened once for several methods
        answer = row.answer(x, certify=certify, dtype=loaded.dtype, rtol=asked, **chosen)
        if answer is None:
            return None
        power = exponent if exponent is None or rows is None else exponent[rows]
        code = methods.index(name)
        value, proof = settle(part, answer, power, code=code, methods=methods, rtol=rtol, certify=certify)
        if keep is None or not spectral:
            return (value,), proof
        n = min(loaded.raw.shape[1:])
        found = usable(answer.spectrum, len(value), n, loaded.dtype, value.device)
        values = torch.where(part.finite[:, None], found.values, torch.nan)
        return (value, scale(values, part.exponent if power is None else power), found.vectors), proof

    (value, *spectrum), certificate = climb(names, attempt)
    if keep is not None and spectrum:
        keep.append(Spectrum(*(x.reshape(loaded.shape + x.shape[1:]) for x in spectrum)))
    return value.reshape(loaded.shape + value.shape[1:]), certificate.reshape(loaded.shape)


def _rows(x: Any, keep: Tensor) -> Any:
    """Rows `keep` of a tensor; anything else unchanged."""
    return x[keep] if isinstance(x, Tensor) and x.ndim > 0 else x
