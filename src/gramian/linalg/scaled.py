"""Powers and products of matrices in logarithmic scale: neither overflows nor vanishes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from gramian.errors import InputError, ShapeError
from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, default_rtol, require_converged, uncertified, verdict
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import pair, product
from gramian.linalg.engine.loading import Loaded, check, choose, load
from gramian.linalg.engine.real_form import less_certain, nearest_complex, real_form
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.scaling import exponent_of, scale
from gramian.linalg.inverse import inv_ex

MAX_POWER = 2**48
"""Exponents of two, at most 2¹² for each factor, must fit 64 bits; rounding alone exceeds any `rtol` long before."""

POWER = ("squaring_double_double",)
PRODUCT = ("sequential",)
Slogdet = tuple[Tensor, Tensor]


class _Frame(NamedTuple):
    """A change of basis W, its approximate inverse V, and κ ≥ ‖W‖‖W⁻¹‖. Norms are of W X W⁻¹; None is the identity.

    In the basis of its eigenvectors a matrix has ‖Aᵏ‖ ≈ ‖A‖ᵏ, so that bounds that multiply norms stay tight.
    """

    w: Tensor | None
    v: Tensor | None
    kappa: Tensor
    defect: Tensor

    def norm(self, x: Tensor, low: Tensor) -> Tensor:
        """An upper bound on ‖W (X + low) W⁻¹‖₂."""
        if self.w is None or self.v is None:
            gram = x.mT @ x
            largest, _, ok = lapack.eigh(gram)
            top = largest.amax(-1).clamp_min(0) + 20 * x.shape[-1] * U * norm(gram)
            return torch.where(ok, top.sqrt(), norm(x)).minimum(norm(x)) + norm(low)
        y = self.w @ x.to(self.w.dtype) @ self.v
        size = y.abs()
        both = (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt()
        blur = 16 * gamma(x.shape[-1] + 4) * norm(self.w) * norm(x) * norm(self.v)
        return (both + blur) / (1 - self.defect) + self.kappa * norm(low)


def _frames(x: Tensor) -> list[_Frame]:
    """The identity, and the eigenvectors where they are independent."""
    one = x.new_ones(x.shape[0])
    frames = [_Frame(None, None, one, one * 0)]
    try:
        _, v = torch.linalg.eig(x)
        w, info = lapack.inverse(v)
        spread = torch.linalg.svdvals(torch.where(v.isfinite(), v, 0))
    except lapack.LinAlgError:
        return frames
    n = x.shape[-1]
    eye = torch.eye(n, dtype=v.dtype, device=v.device)
    sizes = w.flatten(1).norm(dim=1), v.flatten(1).norm(dim=1)
    defect = (w @ v - eye).flatten(1).norm(dim=1) + 16 * gamma(n) * sizes[0] * sizes[1]
    good = (info == 0) & (defect < 0.5)
    # Where the eigenvectors are dependent, κ is inf.
    lowest = spread[:, -1] - 20 * n * U * spread[:, 0]
    kappa = torch.where(good & (lowest > 0), spread[:, 0] / lowest * (1 + defect) / (1 - defect), math.inf)
    w, v = (torch.where(good[:, None, None], y, eye) for y in (w, v))
    return [*frames, _Frame(w, v, kappa, torch.where(good, defect, 0.0))]


class _Power(NamedTuple):
    """(X + low)·2^exponent, and bounds on its error: of each entry, and in the norm of each frame."""

    x: Tensor
    low: Tensor
    exponent: Tensor
    entries: Tensor
    errors: list[Tensor]


def _times(a: _Power, b: _Power, frames: list[_Frame], certify: bool) -> _Power:
    """a·b, scaled so that its entries are below 1; without bounds if not `certify`."""
    n = a.x.shape[-1]
    p = product(pair(a.x, a.low), pair(b.x, b.low))
    if not certify:
        e = exponent_of(p.hi)
        return _Power(scale(p.hi, -e), scale(p.lo, -e), a.exponent + b.exponent + e, a.entries, [])
    size_a, size_b = a.x.abs() + a.low.abs(), b.x.abs() + b.low.abs()
    grown = 1 + 4 * gamma(n + 4)
    # No entry errs by more than the product's Frobenius bound; one that is zero by the factors' zeros is exact.
    local = torch.where(size_a @ size_b > 0, p.error[:, None, None], 0.0)
    entries = (size_a @ b.entries + a.entries @ (size_b + b.entries)) * grown + local
    errors = [
        f.norm(a.x, a.low) * eb + ea * (f.norm(b.x, b.low) + eb) + f.kappa * p.error
        for f, ea, eb in zip(frames, a.errors, b.errors, strict=True)
    ]
    e = exponent_of(p.hi)
    x, low, entries, *errors = (scale(y, -e).nan_to_num(nan=math.inf) for y in (p.hi, p.lo, entries, *errors))
    return _Power(x, low, a.exponent + b.exponent + e, entries, errors)


def _as_slogdet(x: Tensor, exponent: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """X·2^exponent as a mantissa of norm 1 in `dtype`, ln of the norm in float64, and the relative rounding of both."""
    size = norm(x)
    log_scale = exponent.to(torch.float64) * math.log(2) + size.log()
    unit = x / torch.where(size > 0, size, 1.0)[:, None, None]
    mantissa = unit.to(dtype)
    # An error in the logarithm is a relative error of the matrix; ln 2, the product and the sum are each rounded.
    rounding = norm(mantissa.to(torch.float64) - unit) + 4 * U * (1 + exponent.abs().to(torch.float64))
    return mantissa, log_scale, torch.where(size > 0, rounding, 0.0)


def _finish(
    loaded: Loaded, x: Tensor, exponent: Tensor, error: Tensor, bad: Tensor, dtype: torch.dtype
) -> tuple[Slogdet, Tensor]:
    """Mantissa and log scale, NaN where there is no answer, and the relative error."""
    mantissa, log_scale, rounding = _as_slogdet(x, exponent, dtype)
    size = norm(x)
    relative = error / (size - error).clamp_min(0) + rounding
    relative = torch.where((size == 0) & (error == 0), 0.0, relative).nan_to_num(nan=math.inf)
    mantissa = torch.where(bad[:, None, None], math.nan, mantissa)
    log_scale = torch.where(bad, math.nan, log_scale)
    return (mantissa.reshape(loaded.shape + mantissa.shape[1:]), log_scale.reshape(loaded.shape)), relative


@differentiable(
    derivatives.POWER,
    shapes=lambda a, **_: (torch.empty_like(a), a.new_empty(a.shape[:-2], dtype=torch.float64)),
    methods=POWER,
    a=2,
)
def _matrix_power_scaled_ex(
    a: Tensor, k: int, *, rtol: float | None = None, certify: bool = True
) -> tuple[Slogdet, Certificate]:
    """`matrix_power_scaled_ex` of real matrices."""
    batch, n = load(a), a.shape[-1]
    bad, reason = ~batch.finite, torch.where(batch.finite, cert.NONE, cert.NOT_FINITE)
    base, exponent = batch.x, batch.exponent if k >= 0 else -batch.exponent
    error = base.new_zeros(base.shape[0])
    if k < 0 and n:
        base, proof = inv_ex(base, method="equilibrated", rtol=math.inf)
        singular = ~proof.error_bound.isfinite()
        base = torch.where(singular[:, None, None], torch.eye(n, dtype=base.dtype, device=base.device), base)
        error = torch.where(singular, 0.0, proof.error_bound) * norm(base) * 1.01
        reason = torch.where(singular & ~bad, cert.SINGULAR, reason)
        bad = bad | singular
    eye = torch.eye(n, dtype=base.dtype, device=base.device).expand_as(base)
    frames = _frames(base) if certify and abs(k) > 1 and base.numel() else []
    first = exponent_of(base)
    base, error = scale(base, -first), scale(error, -first)
    entries = error[:, None, None].expand_as(base)
    start = _Power(base, base * 0, exponent + first, entries, [f.kappa * error for f in frames])
    result = start if k else _Power(eye, eye * 0, torch.zeros_like(exponent), eye * 0, [])
    for bit in bin(abs(k))[3:]:
        result = _times(result, result, frames, certify)
        if bit == "1":
            result = _times(result, start, frames, certify)
    if not certify:
        value, _ = _finish(batch, result.x, result.exponent, error, bad, a.dtype)
        return value, uncertified(batch.shape, reason.device, methods=POWER, code=0, reason=reason)
    absolute = norm(result.entries) if k not in (1, -1) else error
    for f, e in zip(frames, result.errors, strict=True):
        # ‖W⁻¹‖‖W‖ ≤ κ takes the frame's norm back to the plain one.
        absolute = absolute.minimum(math.sqrt(n) * f.kappa * e)
    absolute = absolute + norm(result.low)
    value, relative = _finish(batch, result.x, result.exponent, absolute, bad, a.dtype)
    commutator = norm(base @ result.x - result.x @ base) / (norm(base) * norm(result.x)).clamp_min(2.0**-1000)
    return value, verdict(
        relative,
        default_rtol(rtol, a.dtype),
        reason,
        shape=batch.shape,
        methods=POWER,
        code=0,
        residual=commutator,
        steps=max(abs(k).bit_length() - 1, 0) + max(abs(k).bit_count() - 1, 0),
    )


def matrix_power_scaled_ex(
    a: Inexact[Tensor, "*b n n"], k: int, *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[tuple[Inexact[Tensor, "*b n n"], Float[Tensor, "*b"]], Certificate]:
    """`matrix_power_scaled` with its certificate, never raising for a matrix's values.

    Args:
        a, k, method, rtol, certify: as for `matrix_power_scaled`.
    Returns: (mantissa, log_scale) and their `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `matrix_power_scaled`.
    Source: as for `matrix_power_scaled`.

    >>> (mantissa, log_scale), certificate = matrix_power_scaled_ex(torch.tensor([[0.5]]), 10**6)
    >>> mantissa.tolist(), round(log_scale.item(), 3), certificate.converged.item()
    ([[1.0]], -693147.181, True)
    """
    name = "matrix_power_scaled"
    check(name, a, square=True, real=False)
    choose(name, method, dict.fromkeys(POWER))
    if isinstance(k, bool) or not isinstance(k, int) or abs(k) > MAX_POWER:
        raise InputError(f"{name}: expected an integer k with |k| ≤ 2^48, got {k!r}. Use k = 10**6, not 1e6.")
    if not a.is_complex():
        return _matrix_power_scaled_ex(a, k, rtol=rtol, certify=certify)
    found, proof = _matrix_power_scaled_ex(real_form(a), k, rtol=rtol, certify=certify)
    return _of_real_form(found, proof, default_rtol(rtol, a.dtype))


def _of_real_form(found: Slogdet, proof: Certificate, rtol: float) -> tuple[Slogdet, Certificate]:
    """The complex matrix, whose norm is √½ of that of its real form, with the rounding of both parts."""
    mantissa, log_scale = found
    value, rounding = nearest_complex(mantissa * math.sqrt(2))
    size = log_scale.detach().abs()
    lost = rounding + 2 * torch.finfo(mantissa.dtype).eps + 2 * U * (1 + size)
    lost = torch.where(size.isfinite(), lost, 0.0)  # of zero, whose logarithm is −inf
    return (value, log_scale - math.log(2) / 2), less_certain(proof, lost, rtol)


def matrix_power_scaled(
    a: Inexact[Tensor, "*b n n"], k: int, *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Inexact[Tensor, "*b n n"], Float[Tensor, "*b"]]:
    """Aᵏ as a mantissa of Frobenius norm 1 and the logarithm of its norm, as `torch.linalg.slogdet` does.

    Aᵏ = mantissa · exp(log_scale), log_scale = ln ‖Aᵏ‖_F.

    Args:
        a: `(..., n, n)`.
        k: an integer, |k| ≤ 2⁴⁸; negative powers go through the inverse.
        method: "squaring_double_double" or "auto".
        rtol: the relative Frobenius error of Aᵏ asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the same value, and only seen failures raise.
    Returns: the mantissa `(..., n, n)` in the dtype of `a`, and log_scale `(...)` in float64, since float32 could not
    hold it. Zero has mantissa 0 and log_scale −inf.
    Raises:
        ShapeError: where `a` is not square.
        DtypeError: where `a` is not floating point, real or complex.
        InputError: for a k that is no such integer, an unknown method, or a negative rtol.
        ConvergenceError: where an inverse does not exist, or the error bound is above rtol.
    Cost: log₂ k to 2 log₂ k double-double products (4 float64 ones), with 5 more each and one eigendecomposition of A
    for the bound. Accuracy: one rounding of the dtype and of log_scale, 1e-9 at k = 10⁶, while k κ² 1e-21 is below it,
    κ being the condition number of the eigenvectors. The certificate's residual is ‖AP − PA‖ / (‖A‖‖P‖).
    Source: Higham, Functions of Matrices (2008), §4.1; Ozaki et al., Numer. Algorithms 59 (2012), §3, the products.

    >>> mantissa, log_scale = matrix_power_scaled(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 10**6)
    >>> mantissa, round(log_scale.item() / 0.6931471805599453)
    (tensor([[1., 0.],
            [0., 0.]]), 1000000)
    """
    value, certificate = matrix_power_scaled_ex(a, k, method=method, rtol=rtol, certify=certify)
    require_converged("matrix_power_scaled", certificate)
    return value


def product_scaled_ex(
    matrices: Iterable[Tensor], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[tuple[Inexact[Tensor, "*b m n"], Float[Tensor, "*b"]], Certificate]:
    """`product_scaled` with its certificate, never raising for a matrix's values.

    Args:
        matrices, method, rtol, certify: as for `product_scaled`.
    Returns: (mantissa, log_scale) and their `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `product_scaled`.
    Source: as for `product_scaled`.

    >>> (mantissa, log_scale), certificate = product_scaled_ex([torch.full((1, 1), 1e-30)] * 100)
    >>> mantissa.item(), round(log_scale.item() / math.log(10)), certificate.converged.item()
    (1.0, -3000, True)
    """
    name = "product_scaled"
    choose(name, method, dict.fromkeys(PRODUCT))
    factors = tuple(matrices)
    for i, a in enumerate(factors):
        check(name, a, real=False)
        if i and (a.shape[:-2] != factors[0].shape[:-2] or a.shape[-2] != factors[i - 1].shape[-1]):
            raise ShapeError(
                f"{name}: matrix {i} of shape {tuple(a.shape)} does not multiply the one before it, of shape "
                f"{tuple(factors[i - 1].shape)}. Give matrices in the order of the product A₁A₂…."
            )
    if not factors:
        raise InputError(f"{name}: expected at least one matrix, got none.")
    if not any(a.is_complex() for a in factors):
        return _product_scaled_ex(factors, rtol=rtol, certify=certify)
    dtype = functools.reduce(torch.promote_types, (a.dtype for a in factors))
    found, proof = _product_scaled_ex(tuple(real_form(a.to(dtype)) for a in factors), rtol=rtol, certify=certify)
    return _of_real_form(found, proof, default_rtol(rtol, dtype))


def _empty_product(matrices: tuple[Tensor, ...], **_: object) -> Slogdet:
    first, last = matrices[0], matrices[-1]
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in matrices))
    size = first.new_empty(first.shape[:-2], dtype=torch.float64)
    return first.new_empty(*first.shape[:-1], last.shape[-1], dtype=dtype), size


@differentiable(derivatives.PRODUCT, shapes=_empty_product, methods=PRODUCT, matrices=2)
def _product_scaled_ex(
    matrices: tuple[Tensor, ...], *, rtol: float | None, certify: bool = True
) -> tuple[Slogdet, Certificate]:
    """`product_scaled_ex` of real matrices."""
    batches: list[Loaded] = [load(a) for a in matrices]
    dtype = functools.reduce(torch.promote_types, (a.dtype for a in matrices))
    x, exponent = batches[0].x, batches[0].exponent
    finite = batches[0].finite
    # `local` (error of each partial product) and `suffix` (norm of all that follows it) in logarithms.
    local: list[Tensor] = []
    for b in batches[1:]:
        k = b.x.shape[-2]
        rough = gamma(k) * norm(x.abs() @ b.x.abs()) if certify else torch.zeros_like(finite, dtype=torch.float64)
        x = x @ b.x
        e = exponent_of(x)
        exponent = exponent + b.exponent
        local.append(rough.log() + exponent * math.log(2))
        x, exponent, finite = scale(x, -e), exponent + e, finite & b.finite
    if not certify:
        value, _ = _finish(batches[0], x, exponent, norm(x) * 0, ~finite, dtype)
        reason = torch.where(finite, cert.NONE, cert.NOT_FINITE)
        return value, uncertified(batches[0].shape, reason.device, methods=PRODUCT, code=0, reason=reason)
    size = norm(x).log() + exponent * math.log(2)
    after, after_exponent, error = None, torch.zeros_like(exponent), torch.zeros_like(size)
    for b, log_error in zip(reversed(batches[1:]), reversed(local), strict=True):
        follows = 0.0 if after is None else norm(after).log() + after_exponent * math.log(2)
        share = torch.where(log_error == -math.inf, 0.0, (log_error + follows - size).exp())
        error = error + share.nan_to_num(nan=math.inf)
        after = b.x if after is None else b.x @ after
        e = exponent_of(after)
        after, after_exponent = scale(after, -e), after_exponent + b.exponent + e
    # The norms of the following factors are rounded as well: a second-order effect, which the factor 2 covers.
    absolute = 2 * error * norm(x)
    absolute = torch.where(error == 0, 0.0, absolute).nan_to_num(nan=math.inf)
    value, relative = _finish(batches[0], x, exponent, absolute, ~finite, dtype)
    return value, verdict(
        relative,
        default_rtol(rtol, dtype),
        torch.where(finite, cert.NONE, cert.NOT_FINITE),
        shape=batches[0].shape,
        methods=PRODUCT,
        code=0,
        steps=len(batches) - 1,
        failure_probability=math.nan,
    )


def product_scaled(
    matrices: Iterable[Tensor], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Inexact[Tensor, "*b m n"], Float[Tensor, "*b"]]:
    """The product A₁A₂…A_L of many matrices as a mantissa of Frobenius norm 1 and the logarithm of its norm.

    A₁A₂…A_L = mantissa · exp(log_scale).

    Args:
        matrices: an iterable of `(..., mᵢ, mᵢ₊₁)` of one batch shape, in the order of the product. (The Jacobian of a
            network begins with its last layer.)
        method: "sequential" or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the widest dtype if None.
        certify: whether to estimate the error; if False, the same value, and only seen failures raise.
    Returns: the mantissa in the widest dtype, and log_scale `(...)` in float64, −inf for a product that is zero.
    Raises:
        ShapeError: where a matrix does not multiply the one before it.
        DtypeError: where a matrix is not floating point, real or complex.
        InputError: for no matrix, an unknown method, or a negative rtol.
        ConvergenceError: where a matrix is not finite, or the estimate of the error is above rtol. The product may
            cancel, as that of two projections onto disjoint spaces.
    Cost: L float64 products from the left, two more each for the error, and all factors in memory. Accuracy: Lnu times
    the factor by which the norms of the parts exceed that of the product. The error is a first-order estimate,
    Σⱼ γ ‖|A₁…Aⱼ₋₁||Aⱼ|‖ ‖Aⱼ₊₁…A_L‖.
    Source: Higham, Accuracy and Stability (2002), §3.7.

    >>> layers = [0.01 * torch.eye(3)] * 1000
    >>> mantissa, log_scale = product_scaled(layers)
    >>> round((log_scale - 0.5 * math.log(3)).item() / math.log(10))
    -2000
    """
    value, certificate = product_scaled_ex(matrices, method=method, rtol=rtol, certify=certify)
    require_converged("product_scaled", certificate)
    return value
