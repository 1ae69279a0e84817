"""The matrix exponential, with certificates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Inexact
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, require_converged
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import Pair, Product, product, rough, two_sum, unbounded
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.exponential import Exponential, exponential
from gramian.linalg.engine.function import MatrixFunction, evaluate, register
from gramian.linalg.engine.real_form import takes_complex
from gramian.linalg.engine.rounding import U, norm
from gramian.linalg.engine.scaling import scale
from gramian.linalg.engine.similarity import balance, similar

__all__ = ["expm", "expm_ex"]

LN2_HIGH, LN2_LOW = float.fromhex("0x1.62e42feep-1"), 1.90821492927058770002e-10
"""ln 2 in two parts, the first of 32 bits, so that its products with integers below 2²⁰ are exact. Cody and Waite."""

WHOLE = 2**20

USELESS = 1e12
"""κ of eigenvectors from which a defective part is more likely than that they help."""


def _by_squaring(times: Product, *, in_basis: bool = False) -> Callable[..., Answer]:
    """e^A = e^μ e^(A − μI), μ = tr A/n, which makes the matrix as small as any shift does.

    With `in_basis`, that of a similar matrix, which is near normal: far from normal the bound of a squaring, a product
    of norms, grows where the powers do not.
    """

    def run(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
        n = x.shape[-1]
        mean = x.diagonal(dim1=-2, dim2=-1).mean(-1) if n else x.new_zeros(x.shape[0])
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        hi, low = two_sum(x, -mean[:, None, None] * eye)
        cheap = unbounded if times is rough and not certify else times
        shifted = Pair(hi, low, torch.zeros_like(mean))
        if in_basis and x[0:1].numel():
            found = _in_basis(shifted, certify)
        else:
            found = exponential(shifted, cheap, bounded=certify)
        power = (mean / math.log(2)).round().clamp(-WHOLE, WHOLE)
        # |rest| < 0.4, with an error of U in the last product, so that the factor has one of 4U.
        factor = ((mean - power * LN2_HIGH) - power * LN2_LOW).exp()
        value = found.value.hi * factor[:, None, None] + found.value.lo * factor[:, None, None]
        exponent = found.exponent + power.long()
        out = scale(value, exponent)
        known = found.value.error.isfinite() & (mean.abs() < WHOLE / 2)
        # An entry is at least e^μ/n, since a spectral radius is at least the mean.
        above = (known & ~out.isfinite().flatten(1).all(1)) | (mean > 710 + math.log(max(n, 1)))
        reason = torch.where(known, cert.NONE, cert.INACCURATE)
        reason = torch.where(above, cert.OVERFLOW, reason)
        out = torch.where((known & ~above)[:, None, None], out, math.nan)
        if not certify:
            return Answer.bare(out, reason, found.squarings)
        error = (found.value.error + 8 * U * norm(found.value.hi)) * factor * (1 + 16 * U)
        still, lowest = (norm(hi) == 0) & (mean == 0), torch.full_like(error, max(n, 1) * 2.0**-1074)
        error = torch.where(still, 0.0, scale(error, exponent) + torch.where(exponent < -900, lowest, 0.0))
        residual = (found.value.error / norm(value) * factor).nan_to_num(nan=math.inf)
        return Answer(out, torch.where(known, error, math.inf), residual, reason, found.squarings)

    return run


def _in_basis(a: Pair, certify: bool) -> Exponential:
    """e^A for an exact pair, as that of a matrix that is similar to the balanced one."""
    e = balance(a.hi)
    there = _balanced(_balanced(a, e), -e)
    exact = (there.hi == a.hi) & (there.lo == a.lo)
    e = torch.where(exact.flatten(1).all(1)[:, None], e, 0)
    s = similar(_balanced(a, e), useless=USELESS)
    found = exponential(s.b, product, bounded=certify)
    value, error = s.restored(found.value, found.value.error)
    wide = e.amax(-1) - e.amin(-1)
    whole = _balanced(value, -e)._replace(error=scale(error, wide).nan_to_num(nan=math.inf))
    return found._replace(value=whole)


def _balanced(a: Pair, e: Tensor) -> Pair:
    """2^(eⱼ − eᵢ) aᵢⱼ; what is scaled by more than float64 holds becomes infinite or zero."""
    by = e[:, None, :] - e[:, :, None]
    return a._replace(hi=scale(a.hi, by), lo=scale(a.lo, by))


EXPM = register(
    MatrixFunction(
        "expm",
        {
            "squaring": Method(
                _by_squaring(rough),
                torch.float64,
                1e-13,
                lambda m, n: {"float64": 12},
                "‖A‖ to 1e6 or so, less for matrices far from normal",
            ),
            "squaring_refined": Method(
                _by_squaring(product),
                torch.float64,
                0.0,
                lambda m, n: {"float64": 60},
                "most of the rest, in double-double arithmetic",
            ),
            "diagonalized": Method(
                _by_squaring(product, in_basis=True),
                torch.float64,
                0.0,
                lambda m, n: {"eig64": 1, "float64": 160},
                "matrices far from normal, in a basis of eigenvectors",
            ),
        },
        "square",
        "unscaled",
        plain=torch.linalg.matrix_exp,
        exact=lambda mp, m: mp.expm(m),
    )
)


@takes_complex("expm", square=True)
@differentiable(derivatives.EXPONENTIAL, shapes=lambda m, **_: torch.empty_like(m), methods=EXPM.methods, m=2)
def expm_ex(
    m: Inexact[Tensor, "*b n n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Inexact[Tensor, "*b n n"], Certificate]:
    """`expm` with its certificate, never raising for a matrix's values.

    Args:
        m, method, rtol, certify: as for `expm`.
    Returns: the exponential and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `expm`.
    Source: as for `expm`.

    >>> value, certificate = expm_ex(torch.zeros(2, 2))
    >>> value.tolist(), certificate.converged.item()
    ([[1.0, 0.0], [0.0, 1.0]], True)
    """
    return evaluate(EXPM, m, method=method, rtol=rtol, certify=certify)


def expm(
    m: Inexact[Tensor, "*b n n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> Inexact[Tensor, "*b n n"]:
    """The exponential of a square matrix.

    expm(M) = I + M + M²/2! + M³/3! + …

    Args:
        m: `(..., n, n)`.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., n, n)`, the exponential, in the dtype of `m`.
    Raises:
        ShapeError: where `m` is not square.
        DtypeError: where `m` is not floating point, real or complex.
        InputError: for an unknown method, or a negative rtol.
        ConvergenceError: where the error bound is above rtol, or the exponential overflows.
    Cost: 4 to 10 float64 products and log₂‖M‖ squarings; four times that in double-double arithmetic, where float64
    does not reach rtol; ten times that, and an eigendecomposition, far from normal. Accuracy: one rounding of the dtype
    up to ‖M‖ of about 1e5; the bound grows with ‖M‖ as the condition number does. The certificate's residual is the
    bound before the last rounding.
    Source: Al-Mohy and Higham, SIAM J. Matrix Anal. Appl. 31 (2009); Higham, Functions of Matrices (2008), chapter 10;
    balancing, Osborne, J. ACM 7 (1960).

    >>> expm(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    tensor([[1., 1.],
            [0., 1.]])
    """
    value, certificate = expm_ex(m, method=method, rtol=rtol, certify=certify)
    require_converged("expm", certificate)
    return value
