"""The largest singular value, without the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import singular_derivatives
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.engine import probes
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.escalation import Number, numbers
from gramian.linalg.engine.krylov import (
    FAILURE,
    Krylov,
    by,
    default_generator,
    exclusion_ratio,
    forth_and_back,
    lanczos,
    next_check,
    random_rows,
    ritz,
    top_bound,
    top_vector,
)
from gramian.linalg.engine.loading import check, choose, load, over, unscaled
from gramian.linalg.engine.real_form import real_form, unstacked
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.scaling import scale
from gramian.linalg.linear_map import LinearMap, ScaledMap, TensorMap, as_linear_map, is_dense, scaled_map
from gramian.linalg.singular import by_gram, svd_double_double

SMALL = 512
"""Up to this smaller side the eigenvalues of the Gram matrix cost less than the Krylov method."""
BLOCK = 16
"""Starting vectors. A block of 16 almost surely overlaps the leading vector: 22 steps where one vector takes 102
(2048², normal entries, four digits), each three times as long on two cores; and its bound tolerates float32's
rounding."""
MAX_STEPS = 40
SEEN = 16
"""Random vectors that measure the rounding of the Krylov run."""
PLAIN = 1e-9
"""The rtol from which the Gram matrix in float64 is accurate enough."""
NARROW = 5e-5
"""The rtol from which Lanczos in float32 can be certified: the rounding, 3e-6, over the block's overlap."""

Apply = Callable[[Tensor], Tensor]
Twice = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | float]]


class Top(NamedTuple):
    """√λ_max from below, a bound on what is above that, and the number of steps."""

    value: Tensor
    error: Tensor
    steps: int


def search(apply: Apply, start: Tensor, share: float) -> tuple[Krylov, Tensor]:
    """Lanczos until the largest eigenvalue is known to a relative `share`, but for rounding; and T's largest (B,)."""
    before: tuple[int, Tensor] | None = None
    theta = start.new_zeros(0)
    noise = 32 * torch.finfo(start.dtype).eps

    def stop(found: Krylov) -> int:
        nonlocal before, theta
        theta = ritz(found)
        now = exclusion_ratio(found, theta[:, None] * (1 + share), noise * theta[:, None])[:, 0].log() + 0.1
        more = 0 if bool(((now < 0) | (theta <= 0)).all()) else next_check(found, before, now)
        before = found.t.shape[-1] // found.block, now
        return more

    found = lanczos(apply, start, MAX_STEPS, stop=stop)
    if before is None or before[0] * found.block < found.t.shape[-1]:
        theta = ritz(found)
    return found, theta


def start_of(generator: torch.Generator | None, like: Tensor, n: int, batch: int) -> Tensor:
    return random_rows(default_generator(generator), like, batch, min(BLOCK, n), n)


def _largest(apply: Apply, start: Tensor, twice: Twice, rtol: float, certify: bool = True) -> Top:
    """√λ_max of AᵀA; `twice` gives rows z AᵀA, z Aᵀ and a bound on their rounding, relative to ‖z‖_F, in float64.

    `apply` may round: D = AᵀAW − WT − FE_qᵀ is measured by its products with random vectors. Without `certify` there
    are none, and the error is inf.
    """
    share = 1.8 * rtol
    found, theta = search(apply, start, share)
    near = theta * (1 + share)
    p = found.t.shape[-1]
    seen = probes.probes(p, start.device, SEEN)
    weights = top_vector(found, theta)[:, None]
    if certify:
        weights = torch.cat([seen.omega.mT.expand(start.shape[0], -1, -1), weights], -2)
    rows = found.rows.to(torch.float64)
    z = weights @ rows
    exact, forth, rounding = twice(z)
    if not certify:
        low = forth[:, -1].norm(dim=-1) / z[:, -1].norm(dim=-1).clamp_min(2.0**-500)
        return Top(low, torch.full_like(low, math.inf), p // found.block)
    ours = (weights @ found.t) @ rows + weights[..., -found.block :] @ found.residual.to(torch.float64)
    noise = probes.two_norm_bound((exact - ours)[:, :-1], seen, rounding * norm(z))
    high = top_bound(found, theta, near, noise=noise)
    size = z[:, -1].norm(dim=-1).clamp_min(2.0**-500)
    low = forth[:, -1].norm(dim=-1) / size
    error = (high.clamp_min(0).sqrt() - low).clamp_min(0)
    return Top(low, torch.where(high == 0, 0.0, error + 4 * U * low), p // found.block)


def leading(x: Tensor, rtol: float, generator: torch.Generator | None, certify: bool = True) -> Top:
    """σ₁ by Lanczos on AᵀA with products in x's dtype."""
    m, n = x.shape[-2:]

    def twice(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        back, forth, square = probes.twice(x, z)
        return back, forth, 4 * gamma(m + n) * square

    return _largest(lambda y: forth_and_back(y, x)[1], start_of(generator, x, n, x.shape[0]), twice, rtol, certify)


def leading_vectors(a: Inexact[Tensor, "*b m n"]) -> tuple[Inexact[Tensor, "*b m"], Inexact[Tensor, "*b n"]]:
    """Unit vectors u, v with uᴴAv within 1e-6 of ‖A‖₂, in float64: u vᴴ is then nearly a subgradient of the norm."""
    if a.is_complex():
        u, v = leading_vectors(real_form(a))
        return unstacked(u[..., None])[..., 0], unstacked(v[..., None])[..., 0]
    batch = load(a)
    x = batch.x
    found, theta = search(lambda y: forth_and_back(y, x)[1], start_of(None, x, x.shape[-1], x.shape[0]), 1e-6)
    v = top_vector(found, theta)[:, None] @ found.rows
    v = torch.where(batch.finite[:, None, None], v / norm(v).clamp_min(2.0**-500)[:, None, None], math.nan)
    u = by(v, x.mT)
    u = u / norm(u).clamp_min(2.0**-500)[:, None, None]
    return u.reshape(*batch.shape, -1), v.reshape(*batch.shape, -1)


def norm_by_lanczos(x: Tensor, *, rtol: float, generator: torch.Generator | None, certify: bool = True) -> Number:
    """By block Lanczos on AᵀA from a random start, in x's dtype, and in float64 where its rounding hides rtol."""
    if x.dtype != torch.float64 and rtol < NARROW:
        x = x.to(torch.float64)
    value, error, steps = leading(x, rtol, generator, certify)
    none = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    if not certify:
        return Number(value, error, none, steps)
    poor = (~(error <= rtol * (value - error))).nonzero().flatten()
    if x.dtype != torch.float64 and poor.numel():
        value[poor], error[poor], steps = leading(x[poor].to(torch.float64), rtol, generator)
    # Two events: the start sees the top, the probes see the rounding.
    return Number(value, error, none, steps, 2 * FAILURE)


def norm_by_svdvals(x: Tensor, *, rtol: float, generator: torch.Generator | None, certify: bool = True) -> Number:
    """By all singular values: of the Gram matrix, whose largest is σ₁² to rounding, or with double-double residuals."""
    value = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    error, reason = torch.full_like(value, math.inf), value.long()
    if not x.shape[-1]:
        return Number(value, value, reason)
    if rtol >= PLAIN:
        s, errors, ok = by_gram(x)
        value, error = s[:, -1].clone(), torch.where(ok, errors[:, -1], math.inf)
        if not certify:
            return Number(value, error, torch.where(ok, cert.NONE, cert.LAPACK))
    poor = (~(error <= rtol * (value - error))).nonzero().flatten()
    if poor.numel():
        found = svd_double_double(x[poor].to(torch.float64), rtol=math.inf)
        value[poor], error[poor], reason[poor] = found.value[:, 0], found.error, found.reason
    return Number(value, error, reason)


SPECTRAL_NORM: dict[str, Callable[..., Number]] = {"lanczos": norm_by_lanczos, "svdvals": norm_by_svdvals}


def _norm_of_map(a: Any, rtol: float, generator: torch.Generator | None, certify: bool) -> tuple[Tensor, Certificate]:
    """`spectral_norm_ex` of a map, scaled by the size of its product with one random block; its products are taken as
    exact, but for 16 roundings of its dtype."""
    if isinstance(a, TensorMap):
        a = TensorMap(a.a.to(torch.float64))
    n = a.shape[1]
    own = ScaledMap(a)
    like = torch.empty(0, dtype=torch.float64, device=own.device)
    start = start_of(generator, like, n, 1)
    zero = like.new_zeros(1)
    finite, exponent, value = True, torch.zeros(1, dtype=torch.long, device="cpu"), Number(zero, zero, zero)
    if min(a.shape):
        scaled, exponent, finite = scaled_map(a, start)
        back = scaled.adjoint()
        rounding = 16 * torch.finfo(own.dtype).eps

        def twice(z: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
            forth = scaled.matmat(z[0].mT)
            return back.matmat(forth).mT[None], forth.mT[None], 0.0

        if finite:

            def apply(y: Tensor) -> Tensor:
                return back.matmat(scaled.matmat(y[0].mT)).mT[None]

            top = _largest(apply, start, twice, rtol - rounding, certify)
            value = Number(top.value, top.error + rounding * top.value, zero, top.steps, 2 * FAILURE)
            finite = bool(top.value.isfinite())
    flags = torch.tensor([finite], device=own.device)
    family = {"lanczos": lambda x, rtol, **_: value._replace(reason=torch.zeros_like(value.value, dtype=torch.long))}
    x = like.new_zeros(1, 1, 1)
    back_to = exponent.to(own.device)
    return numbers(
        family, ["lanczos"], rtol, torch.float64, x, flags, (), lambda v, _: scale(v, back_to), certify=certify
    )


@differentiable(
    singular_derivatives.SPECTRAL_NORM,
    shapes=lambda a, **_: a.new_empty(a.shape[:-2], dtype=a.dtype.to_real()),
    methods=SPECTRAL_NORM,
    real=False,
    a=2,
)
def _spectral_norm_ex(
    a: Tensor | LinearMap,
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Certificate]:
    """`spectral_norm_ex` of the last two dimensions."""
    choose("spectral_norm", method, SPECTRAL_NORM)
    if not isinstance(a, Tensor) or not is_dense(a):
        linear = as_linear_map("spectral_norm", a)
        return _norm_of_map(linear, default_rtol(rtol, getattr(linear, "dtype", torch.float32)), generator, certify)
    check("spectral_norm", a, real=False)
    if a.is_complex():
        a = real_form(a)
    batch = unscaled(load(a.mT if a.shape[-2] < a.shape[-1] else a))
    names = [method]
    if method == "auto":
        names = ["svdvals"] if batch.raw.shape[-1] <= SMALL else ["lanczos", "svdvals"]
    if not batch.raw.shape[-1]:
        names = ["svdvals"]
    return numbers(
        SPECTRAL_NORM,
        names,
        default_rtol(rtol, a.dtype),
        a.dtype,
        batch.at(None),
        batch.finite,
        batch.shape,
        lambda value, rows: scale(value, batch.exponent[rows]),
        certify=certify,
        generator=generator,
    )


def spectral_norm_ex(
    a: Inexact[Tensor, ...] | LinearMap,
    *,
    dim: tuple[int, int] = (-2, -1),
    keepdim: bool = False,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, ...], Certificate]:
    """`spectral_norm` with its certificate, never raising for a matrix's values.

    Args:
        a: `(..., m, n)` dense, a sparse matrix `(m, n)`, or a `LinearMap`.
        dim, keepdim: as for `spectral_norm`; the certificate keeps no dimensions.
        method: one of `SPECTRAL_NORM` or "auto".
        rtol: the relative error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
        generator: of the random start; a fixed seed if None.
    Returns: the norms `(...)`, and their certificate; its residual is 0.
    Raises: `ShapeError`, `DtypeError`, `InputError`.
    Cost: as `spectral_norm`.
    Source: van Dorsselaer, Hochstenbach, van der Vorst, SIAM J. Matrix Anal. Appl. 22 (2000), §3.

    >>> value, certificate = spectral_norm_ex(torch.diag(torch.tensor([3.0, 4.0])))
    >>> value.item(), certificate.converged.item()
    (4.0, True)
    """

    def of(x: Any) -> tuple[Tensor, Certificate]:
        return _spectral_norm_ex(x, method=method, rtol=rtol, certify=certify, generator=generator)

    return over("spectral_norm", a, dim, keepdim, of)


def spectral_norm(
    a: Inexact[Tensor, ...] | LinearMap,
    *,
    dim: tuple[int, int] = (-2, -1),
    keepdim: bool = False,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ...]:
    """The largest singular value, ‖A‖₂ = max ‖Ax‖ / ‖x‖.

    Args:
        a: `(..., m, n)` dense, a sparse matrix `(m, n)`, or a `LinearMap`.
        dim: the two dimensions that the matrices have, as for `torch.linalg.matrix_norm`; of dense tensors.
        keepdim: whether they stay, with size 1.
        method: one of `SPECTRAL_NORM` or "auto".
        rtol: the relative error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
        generator: of the random start; a fixed seed if None.
    Returns: the norms `(...)` in the dtype of `a`, or of its real part; that of a map is float64.
    Raises:
        ShapeError, DtypeError, InputError: for arguments that are not as above.
        ConvergenceError: where the error bound is above rtol.
    Cost: "lanczos" takes some 20 steps of two products with 16 vectors, in float32 where rtol is above 5e-5, and two in
    float64 with 17 vectors that bound its rounding. "svdvals", used up to a side of 512 and where Lanczos misses rtol,
    takes the eigenvalues of the Gram matrix. Accuracy: a Rayleigh quotient, so far better than the bound. The bound of
    "lanczos" is an estimate that fails with probability 2 `krylov.FAILURE` over the start.
    Source: van Dorsselaer, Hochstenbach, van der Vorst, SIAM J. Matrix Anal. Appl. 22 (2000), §3.

    >>> spectral_norm(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]))
    tensor(2.)
    """
    value, certificate = spectral_norm_ex(
        a, dim=dim, keepdim=keepdim, method=method, rtol=rtol, certify=certify, generator=generator
    )
    require_converged("spectral_norm", certificate)
    return value
