"""What a matrix function knows about its own answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from gramian.errors import ConvergenceError, InputError, some
from gramian.linalg.engine.transforms import has_no_values, with_plain

KINDS = ("bound", "estimate")
"""A bound is never below the true error. An estimate may be, with the probability that the certificate states."""

REASONS = (
    "none",
    "the matrix holds NaN or inf",
    "the answer does not exist: the matrix is singular or rank-deficient",
    "the matrix is not symmetric, or not Hermitian",
    "the answer does not exist: the matrix has negative eigenvalues beyond rounding",
    "the error bound is above rtol",
    "LAPACK did not converge",
    "the answer overflows its dtype: convert the matrix to a wider one, such as float64, or change its scale",
    "the answer does not exist: the matrix has eigenvalues on the imaginary axis, up to rounding",
    "the answer does not exist: the matrix has eigenvalues on the negative real axis, up to rounding",
    "no certificate was asked for",
    "the answer underflows its dtype: convert the matrix to a wider one, such as float64, or change its scale",
)
"""Why a matrix failed. Saved certificates hold the index, so a new reason goes to the end."""
(
    NONE,
    NOT_FINITE,
    SINGULAR,
    NOT_SYMMETRIC,
    INDEFINITE,
    INACCURATE,
    LAPACK,
    OVERFLOW,
    NO_SIGN,
    ON_CUT,
    UNASKED,
    UNDERFLOW,
) = range(len(REASONS))

DAMPED = frozenset(("inv", "solve", "lstsq", "inv_root", "sqrtm"))
"""The functions that take `damping`."""

RTOL = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
RTOL |= {torch.complex128: RTOL[torch.float64], torch.complex64: RTOL[torch.float32]}
"""The default rtol of each dtype. Half types: a few roundings of the answer itself. Wider types: far enough above one
rounding that ordinary ill-conditioned input passes. How good an answer is, its bound says, not this number."""


@dataclass(frozen=True, repr=False)
class Certificate:
    """What a matrix function knows about the error of its own answer, with one entry per matrix in every tensor.

    Attributes:
        converged: `(...)`, whether `error_bound` is at most the rtol asked for.
        residual: `(...)`, how far the answer is from satisfying its defining equation; each function says how measured.
        error_bound: `(...)`, a bound on ‖answer − exact‖_F / ‖exact‖_F, exact being the function of the matrix as
            given, damping included. inf where nothing is known.
        kind: `(...)`, an index into `KINDS`: 0 for a proven bound, 1 for an estimate.
        failure_probability: `(...)`, the probability that the error exceeds an estimate; NaN where it is unknown.
        steps: `(...)`, the iterations taken, 0 for a direct method.
        method: `(...)`, an index into `methods`.
        reason: `(...)`, an index into `REASONS`: why the matrix failed, 0 where it did not.
        methods: the names of the function's methods.

    >>> import gramian.linalg as gl
    >>> value, certificate = gl.inv_ex(torch.tensor([[[2.0]], [[0.0]]]))
    >>> certificate.converged.tolist(), certificate.reasons
    ([True, False], ['none', 'the answer does not exist: the matrix is singular or rank-deficient'])
    >>> gl.inv_ex(torch.tensor([[2.0]]))[1]
    <Certificate of 1 matrix: converged, error at most ..., by ...>
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
        """The method that each matrix took, in row-major order of the batch (synchronizes the device)."""
        return [self.methods[code] for code in self.method.flatten().tolist()]

    @property
    def kind_names(self) -> list[str]:
        """Whether each `error_bound` is a bound or an estimate, in row-major order of the batch."""
        return [KINDS[code] for code in self.kind.flatten().tolist()]

    @property
    def reasons(self) -> list[str]:
        """Why each matrix failed, `"none"` where it did not, in row-major order of the batch."""
        return [REASONS[code] for code in self.reason.flatten().tolist()]

    def __repr__(self) -> str:
        name, shape = type(self).__name__, tuple(self.converged.shape)
        if not _is_readable(self.converged):
            return f"<{name} of a batch of shape {shape}, whose values are not known here>"
        count, num_good = self.converged.numel(), int(self.converged.sum())
        if count == 0:
            return f"<{name} of a batch of shape {shape}, without a matrix>"
        verdict = "converged" if num_good == count else f"{num_good} converged, {count - num_good} failed"
        known = self.error_bound[self.converged]
        worst = ""
        if num_good:
            about = "estimated at" if bool(self.kind[self.converged].any()) else "at most"
            worst = f", error {about} {known.max().item():.0e}"
        told = [f"; {reason}" for reason in dict.fromkeys(self.reasons) if reason != REASONS[NONE]]
        methods = ", ".join(dict.fromkeys(self.method_names))
        return (
            f"<{name} of {count:,} matri{'x' if count == 1 else 'ces'}: {verdict}{worst}, by {methods}{''.join(told)}>"
        )

    def _repr_html_(self) -> str:
        """A table with one row for each method and outcome."""
        from html import escape

        from gramian.rows import Rows

        if not _is_readable(self.converged):
            return escape(repr(self))
        groups: dict[tuple[str, str, str], list[int]] = {}
        for place, key in enumerate(zip(self.method_names, self.kind_names, self.reasons, strict=True)):
            groups.setdefault(key, []).append(place)
        bounds, steps = self.error_bound.flatten().tolist(), self.steps.flatten().tolist()
        rows = Rows(
            {
                "method": method,
                "matrices": len(places),
                "outcome": "converged" if reason == REASONS[NONE] else reason,
                "worst error": max(bounds[place] for place in places),
                "kind": kind,
                "most steps": max(steps[place] for place in places),
            }
            for (method, kind, reason), places in groups.items()
        )
        return f"<p>{escape(repr(self))}</p>{rows._repr_html_()}"

    @staticmethod
    def fields() -> tuple[str, ...]:
        """The names of its tensors, in order."""
        return _TENSORS

    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order of the fields."""
        return [getattr(self, name) for name in _TENSORS]

    def reshape(self, shape: Sequence[int]) -> Certificate:
        """The same for a batch of another shape."""
        return Certificate(*(x.reshape(tuple(shape)) for x in self.tensors()), methods=self.methods)


def _is_readable(x: Tensor) -> bool:
    """Whether its values can be printed: not while a compiler traces, under vmap, or on a device without values."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return not (torch.compiler.is_compiling() or has_no_values(x) or functorch.is_functorch_wrapped_tensor(x))


_TENSORS = tuple(f.name for f in fields(Certificate) if f.name != "methods")


def verdict(
    bound: Tensor,
    rtol: float,
    reason: Tensor,
    *,
    methods: Sequence[str],
    code: int,
    shape: Sequence[int] | None = None,
    residual: Tensor | None = None,
    steps: int = 0,
    failure_probability: float | None = None,
) -> Certificate:
    """The certificate of answers whose relative error is at most `bound` (B,), reshaped to `shape` (None: (B,)).

    A `reason` other than none or inaccurate makes the bound inf. A `failure_probability` other than None and 0 (NaN:
    unknown) makes it an estimate.
    """
    decided = (reason != NONE) & (reason != INACCURATE)
    bound = torch.where(decided, math.inf, bound.to(torch.float64)).nan_to_num(nan=math.inf, posinf=math.inf)
    converged = (reason == NONE) & (bound <= rtol)
    reason = torch.where((reason == NONE) & ~converged, INACCURATE, reason)
    residual = torch.zeros_like(bound) if residual is None else residual.to(torch.float64)
    failure = failure_probability or 0.0
    found = Certificate(
        converged=converged,
        residual=torch.where(reason == NOT_FINITE, math.nan, residual),
        error_bound=bound,
        kind=torch.full_like(reason, int(failure != 0)),
        failure_probability=torch.full_like(bound, failure),
        steps=torch.full_like(reason, steps),
        method=torch.full_like(reason, code),
        reason=reason,
        methods=tuple(methods),
    )
    return found if shape is None else found.reshape(shape)


def uncertified(
    shape: Sequence[int],
    device: torch.device,
    *,
    methods: Sequence[str],
    code: int,
    steps: int = 0,
    reason: Tensor | None = None,
) -> Certificate:
    """The certificate of answers for which none was asked: their error is not known, and they never converge.

    `reason` is what was seen to fail, `NONE` elsewhere.
    """
    count = torch.zeros(tuple(shape), dtype=torch.long, device=device)
    unknown = torch.full(tuple(shape), math.nan, dtype=torch.float64, device=device)
    return Certificate(
        converged=count.bool(),
        residual=unknown,
        error_bound=torch.full_like(unknown, math.inf),
        kind=torch.ones_like(count),
        failure_probability=unknown,
        steps=torch.full_like(count, steps),
        method=torch.full_like(count, code),
        reason=torch.full_like(count, UNASKED) if reason is None else _asked_for_none(reason.reshape(count.shape)),
        methods=tuple(methods),
    )


def _asked_for_none(reason: Tensor) -> Tensor:
    return torch.where(reason == NONE, UNASKED, reason)


def default_rtol(rtol: float | None, dtype: torch.dtype) -> float:
    """`rtol` as a number ≥ 0; the default of the dtype if None."""
    if rtol is None:
        return RTOL[dtype]
    if not rtol >= 0:
        raise InputError(f"rtol: expected a number ≥ 0, got {rtol}. Leave it out for the dtype's default.")
    return float(rtol)


def require_converged(name: str, certificate: Certificate) -> None:
    """Raise a `ConvergenceError` that names the failed matrices, why, and what to do.

    An answer for which no certificate was asked has not failed.
    """
    tensors = certificate.tensors()
    if torch.compiler.is_compiling():
        _require_in_graph(name, ",".join(certificate.methods), tensors)
    elif not has_no_values(certificate.converged):
        with_plain(lambda *tensors: _require(name, Certificate(*tensors, methods=certificate.methods)), *tensors)


def _require(name: str, certificate: Certificate) -> None:
    fine = certificate.converged | (certificate.reason == UNASKED)
    if bool(fine.all()):
        return
    failed = (~fine.flatten()).nonzero().flatten().tolist()
    reasons = certificate.reasons
    bounds = certificate.error_bound.flatten().tolist()
    shown = some((f"matrix {i}: {reasons[i]} (error bound {bounds[i]:.1e})" for i in failed), separator="; ")
    ways = dict.fromkeys(_advice(name, REASONS.index(reasons[i])) for i in failed)
    raise ConvergenceError(
        f"{name}: {len(failed)} of {len(reasons)} matrices failed their certificate. {shown}. "
        f"{' '.join(filter(None, ways))} {name}_ex gives the value and the certificate.".replace("  ", " ")
    )


def _advice(name: str, reason: int) -> str:
    """What helps a function whose answer failed for a reason; empty where the reason says it, or nothing does."""
    damping = "Pass damping=, a multiple of the identity that is added" if name in DAMPED else ""
    if reason == NOT_FINITE:
        return "Find out where NaN or inf comes from; no setting helps."
    if reason == SINGULAR:
        other = {"inv": "take pinv", "solve": "take lstsq"}.get(name, "")
        found = ", or ".join(filter(None, [damping, other]))
        return f"{found}." if found else "Only a matrix of full rank has one."
    if reason == NOT_SYMMETRIC:
        return "If that is rounding alone, pass (m + m.mH) / 2."
    if reason == INDEFINITE:
        return f"{damping}, larger than minus the least eigenvalue." if damping else ""
    if reason == INACCURATE and name == "cond":
        return "Beyond about 1e14 κ is not told from that of a singular matrix, inf."
    if reason in (INACCURATE, LAPACK):
        return f"{damping}, a wider dtype, or a larger rtol." if damping else "Pass a wider dtype, or a larger rtol."
    if reason == NO_SIGN:
        return "A small multiple of the identity, added to the matrix, moves them off the axis; its sign is another."
    if reason == ON_CUT:
        return "With a multiple of the identity added that makes them positive there is one, of another matrix."
    return ""


@torch.library.custom_op(
    "gramian::linalg_require", mutates_args=(), schema="(str name, str methods, Tensor[] tensors) -> ()"
)
def _require_in_graph(name: str, methods: str, tensors: Sequence[Tensor]) -> None:
    _require(name, Certificate(*tensors, methods=tuple(methods.split(","))))


@_require_in_graph.register_fake
def _(name: str, methods: str, tensors: Sequence[Tensor]) -> None:
    return None


# Nothing depends on it, so that a compiler would drop it.
_register_effectful_op(torch.ops.gramian.linalg_require.default, _EffectType.ORDERED)
