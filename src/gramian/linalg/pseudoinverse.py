"""The pseudoinverse of matrices of full rank, and least squares, with certificates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import ShapeError
from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, default_rtol, require_converged, uncertified, verdict
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import Pair, Product, eye_like, minus, pair, plus, product, rough, transpose
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.exponential import two_norm
from gramian.linalg.engine.function import MatrixFunction, evaluate, register
from gramian.linalg.engine.loading import check
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.transforms import has_no_values

__all__ = ["lstsq", "lstsq_ex", "pinv", "pinv_ex"]


def _by_svd(x: Tensor, times: Product, steps: int, certify: bool) -> Answer:
    """X = B(AB)ᵀ with B = VΣ⁻¹, so many steps X ← X + BR with R = (AB)ᵀ(I − AX), and a bound from the R that is left.

    With (AB)ᵀAB = I + F, A† − X = (AᵀA)⁻¹Aᵀ(I − AX) = B(I + F)⁻¹R, so that its norm is at most
    ‖BR‖ + ‖B‖₂‖F‖‖R‖/(1 − ‖F‖). V need not be orthogonal, and κ enters once.
    """
    n = x.shape[-1]
    a = pair(x)
    _, s, v, ok = lapack.svd(x)
    top = s[:, :1] if n else s.new_ones(s.shape[0], 1)
    zero = (s <= U * top * 2.0**-4).any(-1)
    safe = torch.where(zero[:, None], top.clamp_min(2.0**-1000), s)
    b = v / safe[:, None, :]
    w = times(a, pair(b))
    close = pair(b @ w.hi.mT)
    # W stands for AB up to its error, which meets I − AX = (I − AA†) + W(I + F)⁻¹R, below 2.
    left = transpose(Pair(w.hi, w.lo, torch.zeros_like(w.error)))
    square = times(left, a)
    for _ in range(steps):
        inner, _ = minus(left, times(square, close))
        close = plus(close, b @ inner)
    if not certify:
        reason = torch.where(ok, torch.where(zero & (times is product), cert.SINGULAR, cert.NONE), cert.LAPACK)
        return Answer.bare(torch.where((reason == cert.SINGULAR)[:, None, None], math.nan, close.hi).mT, reason, steps)
    f, f_error = minus(times(transpose(w), w), eye_like(x))
    size = norm(f) + f_error
    inner, inner_error = minus(left, times(square, Pair(close.hi, close.lo, torch.zeros_like(w.error))))
    inner_error = inner_error + 2 * w.error
    step = b @ inner
    length = norm(b)
    blur = inner_error + gamma(n + 2) * norm(inner)
    reach = length.minimum(two_norm(b / length[:, None, None]) * length) if n else length
    rest = reach * (norm(inner) + inner_error) * size / (1 - size) + reach * blur
    value = plus(close, step if steps else torch.zeros_like(step))
    unused = 0.0 if steps else norm(step)
    far = unused + rest
    proven = (size < 0.5) & ~zero & ok & (norm(inner) + inner_error < 0.3)
    error = torch.where(proven, (far + norm(value.lo)) * (1 + 2.0**-20), math.inf)
    if not x[0:1].numel():
        error, zero = torch.zeros_like(error), torch.zeros_like(zero)
    reason = torch.where(proven, cert.NONE, torch.where(zero | (times is product), cert.SINGULAR, cert.INACCURATE))
    reason = torch.where(ok, reason, cert.LAPACK)
    if not x[0:1].numel():
        reason = torch.zeros_like(reason)
    out = torch.where((reason == cert.SINGULAR)[:, None, None], math.nan, value.hi)
    return Answer(out.mT, error, norm(inner), reason, steps)


def _svd(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    return _by_svd(x, rough, 0, certify)


def _svd_refined(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    return _by_svd(x, product, 2, certify)


def _exact(mp: Any, m: Any) -> Any:
    with mp.workdps(120):
        wide = m.rows < m.cols
        a = m.T if wide else m
        try:
            y = (a.T * a) ** -1 * a.T
        except (ZeroDivisionError, TypeError):  # as in `exact_inverse`
            return None
        if not mp.norm(a) * mp.norm(y) < mp.mpf(10) ** 40:
            return None
        return y.T if wide else y


PINV = register(
    MatrixFunction(
        "pinv",
        {
            "svd": Method(
                _svd, torch.float64, 2e-6, lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 4 * m / n}, "κ ≤ 1e4"
            ),
            "svd_refined": Method(
                _svd_refined,
                torch.float64,
                0.0,
                lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 24 * m / n},
                "κ to 1e14, refined with double-double residuals",
            ),
        },
        "general",
        -1,
        plain=torch.linalg.pinv,
        exact=_exact,
    )
)
"""Its methods answer with A†ᵀ, of the shape of A, since `evaluate` transposes what is wide back and forth."""


@differentiable(
    derivatives.PSEUDOINVERSE,
    shapes=lambda a, **_: a.new_empty(*a.shape[:-2], a.shape[-1], a.shape[-2]),
    methods=PINV.methods,
    a=2,
)
def pinv_ex(
    a: Float[Tensor, "*b m n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Float[Tensor, "*b n m"], Certificate]:
    """`pinv` with its certificate, never raising for a matrix's values; NaN where the rank is not full.

    Args:
        a, method, rtol, certify: as for `pinv`.
    Returns: the pseudoinverse and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `pinv`.
    Source: as for `pinv`.

    >>> value, certificate = pinv_ex(torch.tensor([[2.0], [0.0]]))
    >>> value.tolist(), certificate.converged.item()
    ([[0.5, 0.0]], True)
    """
    value, proof = evaluate(PINV, a, method=method, rtol=rtol, certify=certify)
    return value.mT, proof


def pinv(
    a: Float[Tensor, "*b m n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> Float[Tensor, "*b n m"]:
    """The pseudoinverse of a matrix of full rank.

    A† = (AᵀA)⁻¹Aᵀ, or Aᵀ(AAᵀ)⁻¹ where A is wide.

    Where the rank is not full, A† jumps with every perturbation, and rounding alone decides what it is. So it is
    refused: for the pseudoinverse of the nearest matrix of rank k take `svd_lowrank(a, k)`, V S⁻¹ Uᵀ.

    Args:
        a: `(..., m, n)`.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., n, m)`, the pseudoinverse, in the dtype of `a`.
    Raises:
        ShapeError: where `a` has fewer than two dimensions.
        DtypeError: where `a` is not real floating point.
        InputError: for an unknown method, or a negative rtol.
        ConvergenceError: where the rank of a matrix is not full, or its error bound is above rtol.
    Cost: an SVD in float64 and 4 products, 24 refined. Accuracy: what `rtol` asks for, until κ nears 1e14. The
    certificate's residual is ‖(AVΣ⁻¹)ᵀ(I − AX)‖_F.
    Source: Björck, Numerical Methods for Least Squares Problems (1996), §1.2.5 and §2.9.

    >>> pinv(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    tensor([[1.0000, 0.0000, 0.0000],
            [0.0000, 0.5000, 0.0000]])
    """
    value, certificate = pinv_ex(a, method=method, rtol=rtol, certify=certify)
    require_converged("pinv", certificate)
    return value


def lstsq_ex(
    a: Float[Tensor, "*b m n"],
    b: Float[Tensor, "*b m k"],
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> tuple[Float[Tensor, "*b n k"], Certificate]:
    """`lstsq` with its certificate, never raising for a matrix's values; NaN where the rank is not full.

    Args:
        a, b, method, rtol, certify: as for `lstsq`.
    Returns: the solution and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `lstsq`.
    Source: as for `lstsq`.

    >>> value, certificate = lstsq_ex(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
    >>> value.tolist(), certificate.converged.item()
    ([[2.0]], True)
    """
    check("lstsq", a)
    check("lstsq", b)
    if a.shape[:-1] != b.shape[:-1]:
        raise ShapeError(
            f"lstsq: expected (..., m, n) and (..., m, k), got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Expand the batch, and make a column of a vector with b[..., None]."
        )
    dtype = torch.promote_types(a.dtype, b.dtype)
    tolerance, m = default_rtol(rtol, dtype), a.shape[-2]
    y, proof = pinv_ex(a.double(), method=method, rtol=min(tolerance, 1e-10), certify=certify)
    wide = b.double()
    value = y @ wide
    if has_no_values(value):
        return value.to(dtype), proof
    if not certify:
        bare = uncertified(a.shape[:-2], a.device, methods=("pinv",), code=0, steps=0)
        return value.to(dtype), replace(bare, reason=proof.reason)
    size, right, length = (norm(x.detach().reshape(-1, *x.shape[-2:])) for x in (y, wide, value))
    out = value.to(dtype)
    # The rounding of the pseudoinverse, of the product, and to the dtype.
    error = (proof.error_bound.flatten() * 1.01 + gamma(m + 1)) * size * right
    error = error + (
        norm((out.detach().double() - value.detach()).reshape(-1, *out.shape[-2:])) if dtype != torch.float64 else 0.0
    )
    bound = torch.where(right == 0, 0.0, error / (length - error).clamp_min(0))
    reason = proof.reason.flatten()
    reason = torch.where((reason == cert.INACCURATE) & bound.isfinite(), cert.NONE, reason)
    reason = torch.where(right.isfinite(), reason, cert.NOT_FINITE)
    return out, verdict(
        bound,
        tolerance,
        reason,
        shape=a.shape[:-2],
        methods=("pinv",),
        code=0,
        residual=proof.residual.flatten(),
    )


def lstsq(
    a: Float[Tensor, "*b m n"],
    b: Float[Tensor, "*b m k"],
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> Float[Tensor, "*b n k"]:
    """The X with the least ‖AX − B‖_F for a matrix A of full rank, and with the least ‖X‖_F where A is wide.

    X = A†B. Where the rank is not full, rounding alone decides what X is, and it is refused; see `pinv`.

    Args:
        a: `(..., m, n)`.
        b: `(..., m, k)`.
        method: the name of a method of `pinv`, or "auto".
        rtol: the relative Frobenius error of X asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., n, k)`, the solution, in the wider dtype of `a` and `b`.
    Raises:
        ShapeError: where `a` or `b` has fewer than two dimensions, or they do not fit.
        DtypeError: where `a` or `b` is not real floating point.
        InputError: for an unknown method, or a negative rtol.
        ConvergenceError: where the rank of a matrix is not full, or the error bound is above rtol.
    Cost: as for `pinv`, and a product. Accuracy: u ‖A†‖ ‖B‖ / ‖X‖. The certificate's residual is that of `pinv`.
    Source: Björck, Numerical Methods for Least Squares Problems (1996), §1.2.

    >>> a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0], [3.0], [5.0]])
    >>> lstsq(a, b).round(decimals=5).tolist()
    [[1.0], [2.0]]
    """
    value, certificate = lstsq_ex(a, b, method=method, rtol=rtol, certify=certify)
    require_converged("lstsq", certificate)
    return value
