"""Products: xᵀx at half the work, and a·b by several methods."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import DtypeError, InputError, ShapeError
from gramian.linalg import certificate as cert
from gramian.linalg.certificate import Certificate, default_rtol, verdict
from gramian.linalg.engine.batches import broadcast
from gramian.linalg.engine.loading import check, choose
from gramian.linalg.engine.probes import of_norm, probes
from gramian.linalg.engine.rounding import chain_rounding, norm
from gramian.linalg.engine.scaling import exponent_of, scale
from gramian.linalg.engine.symmetric_products import HALVED_FROM, symmetric_product


def syrk(x: Float[Tensor, "*b n d"], *, precision: str = "float32") -> Float[Tensor, "*b d d"]:
    """The Gram matrix of the columns of X.

    syrk(X) = XᵀX, exactly symmetric.

    Half types are accumulated and returned in float32, also under autocast: the sum over samples neither fits float16
    nor survives the 8 bits of bfloat16.

    Args:
        x: `(..., n, d)`, n samples of d features.
        precision: "float32", for the dtype of `x` and at least float32, or "bfloat16", which rounds factors and result
            to 8 bits where d is at least 256.
    Returns: `(..., d, d)`, in the dtype of `x`, at least float32.
    Raises:
        ShapeError: where `x` has fewer than two dimensions.
        DtypeError: where `x` is not real floating point.
        InputError: for another precision.
    Cost: one product; on a CPU, from d = 256 and where no gradient is recorded, 5/8 to 9/16 of one: the part below
    the diagonal is mirrored. Accuracy: nε ‖X‖²_F; in bfloat16 each entry is within 2⁻⁷ √(M_ii M_jj).
    Source: Higham, Accuracy and Stability (2002), §3.5.

    >>> syrk(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[10., 14.],
            [14., 20.]])
    """
    check("syrk", x)
    if precision not in ("float32", "bfloat16"):
        raise InputError(f"syrk: expected precision 'float32' or 'bfloat16', got {precision!r}.")
    wide = torch.promote_types(x.dtype, torch.float32)
    d = x.shape[-1]
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        factor = x.to(torch.bfloat16 if precision == "bfloat16" and d >= HALVED_FROM else wide)
        return symmetric_product(factor.mT, factor, wide)


def second_moment(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b d d"]:
    """The second moment of the rows of X.

    second_moment(X) = XᵀX / n = (1/n) Σ xᵢxᵢᵀ, exactly symmetric.

    Args:
        x: `(..., n, d)`, n ≥ 1 samples of d features; half types as in `syrk`.
    Returns: `(..., d, d)`, in the dtype of `x`, at least float32.
    Raises:
        ShapeError: where `x` has fewer than two dimensions, or no sample.
        DtypeError: where `x` is not real floating point.
    Cost: one product. Accuracy: nε times the mean ‖xᵢ‖².
    Source: Higham, Accuracy and Stability (2002), §3.5.

    >>> second_moment(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[ 5.,  7.],
            [ 7., 10.]])
    """
    check("second_moment", x)
    if not x.shape[-2]:
        raise ShapeError(f"second_moment: expected at least one sample (..., n ≥ 1, d), got {tuple(x.shape)}.")
    return syrk(x) / x.shape[-2]


def _torch(a: Tensor, b: Tensor) -> Tensor:
    """torch's own product, batched in one call."""
    return a @ b


def _loop(a: Tensor, b: Tensor) -> Tensor:
    """One call for each matrix of the batch."""
    batch = broadcast(a.shape[:-2], b.shape[:-2]) or torch.Size()
    count = math.prod(batch)
    left, right = (x.expand(*batch, *x.shape[-2:]).reshape(count, *x.shape[-2:]) for x in (a, b))
    if not count:
        return a @ b
    return torch.stack([x @ y for x, y in zip(left, right, strict=True)]).reshape(*batch, a.shape[-2], b.shape[-1])


def _bfloat16(a: Tensor, b: Tensor) -> Tensor:
    """The factors rounded to bfloat16, 8 bits; the product back in the dtype of the factors."""
    return (a.to(torch.bfloat16) @ b.to(torch.bfloat16)).to(a.dtype)


def _even(x: Tensor) -> Tensor:
    """x with a row and a column of zeros where its sizes are odd."""
    return torch.nn.functional.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))


def _strassen(a: Tensor, b: Tensor) -> Tensor:
    """One level of Strassen–Winograd: 7 products of half the size and 15 sums in place of 8 and 4."""
    m, n = a.shape[-2], b.shape[-1]
    (a1, a2), (b1, b2) = (x.chunk(2, -2) for x in (_even(a), _even(b)))
    (a11, a12), (a21, a22) = a1.chunk(2, -1), a2.chunk(2, -1)
    (b11, b12), (b21, b22) = b1.chunk(2, -1), b2.chunk(2, -1)
    s1, t1 = a21 + a22, b12 - b11
    s2, t2 = s1 - a11, b22 - t1
    p1 = a11 @ b11
    u2 = p1 + s2 @ t2
    u3 = u2 + (a11 - a21) @ (b22 - b12)
    p5 = s1 @ t1
    top = torch.cat([p1 + a12 @ b21, u2 + p5 + (a12 - s2) @ b22], -1)
    bottom = torch.cat([u3 + a22 @ (b21 - t2), u3 + p5], -1)
    return torch.cat([top, bottom], -2)[..., :m, :n]


MATMUL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch": _torch,
    "strassen": _strassen,
    "bfloat16": _bfloat16,
    "loop": _loop,
}


def matmul_ex(
    a: Float[Tensor, ...], b: Float[Tensor, ...], *, method: str = "auto", rtol: float | None = None
) -> tuple[Float[Tensor, ...], Certificate]:
    """`matmul` with its certificate, never raising for a matrix's values.

    `error_bound` and `rtol` are relative to ‖A‖_F ‖B‖_F, as in `matmul`: where the product cancels, no method has
    digits relative to the product itself. `residual` is relative to ‖AB‖_F.

    Args:
        a, b, method, rtol: as for `matmul`.
    Returns: the product and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `matmul`, and three float64 products with 32 random vectors, which measure the error. Accuracy: the
    bound is an estimate, or a bound where B has up to 32 columns.
    Source: this library's own.

    >>> value, certificate = matmul_ex(torch.ones(3, 3), torch.eye(3), method="bfloat16")
    >>> certificate.converged.item(), certificate.method_names
    (True, ['bfloat16'])
    """
    value = matmul(a, b, method=method, rtol=rtol)
    with torch.no_grad():
        return value, _certificate(a, b, value, method, rtol)


def _certificate(a: Tensor, b: Tensor, value: Tensor, method: str, rtol: float | None) -> Certificate:
    shape = value.shape[:-2]
    count, k, n = math.prod(shape), a.shape[-1], b.shape[-1]
    left, right, found = (x.expand(*shape, *x.shape[-2:]).reshape(count, *x.shape[-2:]) for x in (a, b, value))
    finite = left.isfinite().flatten(1).all(1) & right.isfinite().flatten(1).all(1)
    p = probes(n, value.device)
    scaled = []
    for x in (left, right):
        x = torch.where(finite[:, None, None], x, 0.0)
        e = exponent_of(x)
        scaled.append((scale(x.to(torch.float64), -e), e))
    (x, ex), (y, ey) = scaled
    z = scale(found.to(torch.float64), -(ex + ey))
    sizes = norm(x) * norm(y)
    omega = p.omega.expand(count, -1, -1)
    blur = chain_rounding(k + 2 * n, norm(omega)) * (2 * sizes + norm(torch.where(finite[:, None, None], z, 0.0)))
    error = of_norm(z @ omega - x @ (y @ omega), p, blur)
    bound = torch.where(sizes > 0, error / sizes, torch.where(norm(z) == 0, 0.0, math.inf))
    size = norm(z)
    residual = torch.where(size > 0, error / size, torch.where(error == 0, 0.0, math.inf))
    return verdict(
        bound,
        default_rtol(rtol, a.dtype),
        torch.where(finite, cert.NONE, cert.NOT_FINITE),
        shape=shape,
        methods=tuple(MATMUL),
        code=list(MATMUL).index("torch" if method == "auto" else method),
        residual=residual,
        failure_probability=p.failure,
    )


def matmul(
    a: Float[Tensor, ...], b: Float[Tensor, ...], *, method: str = "auto", rtol: float | None = None
) -> Float[Tensor, ...]:
    """The product AB, by torch's product or by a named method that trades accuracy for time.

    "auto" is always torch's product. "strassen" was not faster where it was timed (example 5), and "bfloat16" is only
    where the processor has units for it, at the price of accuracy. "loop" makes one call for each matrix.

    Args:
        a: `(..., m, k)`.
        b: `(..., k, n)`, of the same dtype; the batches are broadcast.
        method: "torch", "strassen", "bfloat16", "loop" or "auto".
        rtol: the error ‖C − AB‖_F / (‖A‖_F ‖B‖_F) that "auto" may make; `certificate.RTOL` of the dtype if None.
    Returns: `(..., m, n)`, in the dtype of the factors.
    Raises:
        ShapeError: where the inner sizes differ, or the batches do not broadcast.
        DtypeError: where a factor is not real floating point, or the dtypes differ.
        InputError: for an unknown method or a negative rtol.
    Cost: one product. Accuracy, relative to ‖A‖_F ‖B‖_F: "torch" and "loop" ku; "strassen" about 18 (k/4 + 6) u in norm
    only, so that a small entry beside large ones loses its digits; "bfloat16" 3·2⁻⁸ whatever the dtype.
    Source: Higham, Accuracy and Stability (2002), §3.5 and theorem 23.3 (the Winograd form).

    >>> matmul(torch.eye(3), torch.ones(3, 3), method="strassen")
    tensor([[1., 1., 1.],
            [1., 1., 1.],
            [1., 1., 1.]])
    """
    check("matmul", a)
    check("matmul", b)
    choose("matmul", method, MATMUL)
    default_rtol(rtol, a.dtype)
    if a.dtype != b.dtype:
        raise DtypeError(f"matmul: expected one dtype, got {a.dtype} and {b.dtype}. Convert one with .to().")
    if broadcast(a.shape[:-2], b.shape[:-2]) is None:
        raise ShapeError(f"matmul: batches {tuple(a.shape[:-2])} and {tuple(b.shape[:-2])} do not broadcast.")
    if a.shape[-1] != b.shape[-2]:
        raise ShapeError(
            f"matmul: expected (..., m, k) and (..., k, n), got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Transpose with .mT where the wrong side is shared."
        )
    return MATMUL["torch" if method == "auto" else method](a, b)
