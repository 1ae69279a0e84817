"""The outermost eigenvalues of a symmetric matrix or map, with their signs."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError, ShapeError
from gramian.linalg import certificate as cert
from gramian.linalg.certificate import Certificate, default_rtol, require_converged, verdict
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable, refused
from gramian.linalg.engine.krylov import (
    Krylov,
    by,
    default_generator,
    lanczos,
    random_rows,
    ritz_pairs,
    without_zero_rows,
)
from gramian.linalg.engine.loading import NEGLIGIBLE, check, load
from gramian.linalg.engine.rounding import U, norm
from gramian.linalg.engine.scaling import scale
from gramian.linalg.linear_map import LinearMap, as_linear_map, is_dense, scaled_map

Which = Literal["magnitude", "largest", "smallest"]
WHICH = ("magnitude", "largest", "smallest")
METHODS = ("eigvalsh", "block_lanczos")
MAX_ROWS = 1000
"""The most vectors of a Lanczos run; each takes 8n bytes."""


def _order(values: Tensor, which: str) -> Tensor:
    """Indices of values (..., n), the ones asked for first."""
    key = values.abs() if which == "magnitude" else values if which == "largest" else -values
    return key.argsort(dim=-1, descending=True, stable=True)


def _by_eigh(a: Tensor, k: int, which: str, rtol: float) -> tuple[Tensor, Certificate]:
    n = a.shape[-1]
    batch = load(a)
    x, size = (batch.x + batch.x.mT) / 2, norm(batch.x)
    apart = norm(batch.x - batch.x.mT)
    uneven = apart > NEGLIGIBLE * n * torch.finfo(a.dtype).eps * size
    reason = torch.where(uneven, cert.NOT_SYMMETRIC, cert.NONE)
    all_, ok = lapack.eigvalsh(x)
    value = all_.gather(-1, _order(all_, which)[..., :k])
    reason = torch.where(batch.finite, torch.where(ok, reason, cert.LAPACK), cert.NOT_FINITE)
    bound = _relative(10 * n * U * size + apart, value, torch.finfo(a.dtype).eps)
    proof = verdict(bound, rtol, reason, shape=batch.shape, methods=METHODS, code=0)
    value = torch.where(batch.finite[:, None], scale(value, batch.exponent), math.nan)
    return value.reshape(*batch.shape, k).to(a.dtype), proof


def _relative(error: Tensor, value: Tensor, rounding: float) -> Tensor:
    """error (B,) relative to ‖value‖, and the rounding of the answer; the zero matrix has an error of 0."""
    size = value.norm(dim=-1)
    return torch.where(error == 0, 0.0, error / size) + torch.where(size > 0, rounding, 0.0)


def _by_lanczos(
    a: LinearMap, k: int, which: str, rtol: float, generator: torch.Generator | None
) -> tuple[Tensor, Certificate]:
    """Block Lanczos in float64 until each residual is at most rtol |θᵢ|, or is the rounding of the map's products."""
    n, dtype = a.shape[-1], getattr(a, "dtype", torch.float32)
    device = torch.device(getattr(a, "device", "cpu"))
    eps = torch.finfo(dtype).eps
    nothing = torch.zeros(1, k, dtype=torch.float64, device=device)
    start = random_rows(default_generator(generator), nothing, 1, min(k, n), n)
    scaled, exponent, finite = scaled_map(a, start)
    steps, symmetric = 0, True

    def apply(rows: Tensor) -> Tensor:
        nonlocal finite, steps, symmetric
        image = scaled.matmat(rows[0].mT).mT[None]
        finite = finite and bool(image.isfinite().all())
        steps += 1
        inner = rows @ image.mT
        uneven = norm(inner - inner.mT) > 1e3 * max(eps, U) * norm(image) + 2.0**-900
        symmetric = symmetric and not bool(uneven.any())
        return image if finite else torch.zeros_like(image)

    def stop(found: Krylov) -> int:
        if not (finite and symmetric):
            return 0
        theta, _, residuals = ritz_pairs(found)
        if theta.shape[-1] < k:
            return 1
        first = _order(theta, which)[..., :k]
        left = residuals.gather(-1, first)
        allowed = (rtol / 2 * theta.gather(-1, first).abs()).clamp_min(4 * eps * float(theta.abs().max()))
        return 0 if bool((left <= allowed).all()) else max(1, steps // 8)

    limit = max(2, MAX_ROWS // len(start[0]))
    found = without_zero_rows(lanczos(apply, start, limit, stop=stop, first=2))
    if finite and symmetric:
        theta, s, _ = ritz_pairs(found)
        first = _order(theta, which)[..., :k]
        value = theta.gather(-1, first)
        if value.shape[-1] < k:  # the zero map: every vector is one of the eigenvalue 0
            value = torch.cat([value, nothing[:, value.shape[-1] :]], -1)
        vectors = by(s[0].mT[first[0]][None], found.rows)
        # Measured afresh: what rounding added to the run is in it.
        left = apply(vectors) - theta.gather(-1, first)[..., None] * vectors
        # Kahan: k eigenvalues are that close, √2 ‖R‖_F for them together.
        residual = norm(left)
        bound = _relative(math.sqrt(2) * residual + 8 * n * U * norm(value[..., None]), value, eps)
        bound = torch.where((residual == 0) & (value == 0).all(-1), 0.0, bound)
        value = scale(value, exponent.to(device))
    else:
        value, bound, residual = nothing + math.nan, nothing[:, 0] + math.inf, nothing[:, 0]
    reason = cert.NONE if finite and symmetric else cert.NOT_FINITE if not finite else cert.NOT_SYMMETRIC
    proof = verdict(
        bound,
        rtol,
        torch.full_like(bound, reason, dtype=torch.long),
        shape=(),
        methods=METHODS,
        code=1,
        residual=residual,
        steps=steps,
        failure_probability=math.nan,
    )
    return value[0].to(dtype), proof


@differentiable(
    refused("eigvalsh_top", "Differentiate torch.linalg.eigvalsh of a dense matrix."),
    shapes=lambda a, k, **_: a.new_empty((*a.shape[:-2], k)),
    methods=METHODS,
    a=2,
)
def eigvalsh_top_ex(
    a: Float[Tensor, "*b n n"] | LinearMap,
    k: int,
    *,
    which: Which = "magnitude",
    rtol: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "*b k"], Certificate]:
    """`eigvalsh_top` with its certificate, never raising for a matrix's values.

    Args:
        a: `(..., n, n)` dense symmetric, a sparse matrix `(n, n)`, or a symmetric `LinearMap`.
        k: how many, from 1 to n.
        which: "magnitude", "largest" or "smallest".
        rtol: the error asked for, relative to the norm of the k values; `certificate.RTOL` of the dtype if None.
        generator: of the random start; a fixed seed if None.
    Returns: the eigenvalues `(..., k)`, and their certificate; its residual is ‖AV − VΘ‖_F, A being scaled to entries
        below 1.
    Raises: `ShapeError`, `DtypeError`, `InputError`.
    Cost: as `eigvalsh_top`.
    Source: Golub and Underwood (1977); Parlett, The Symmetric Eigenvalue Problem (1998), §11.5.

    >>> value, certificate = eigvalsh_top_ex(torch.diag(torch.tensor([1.0, -3.0, 2.0])), 2)
    >>> value.tolist(), certificate.converged.item()
    ([-3.0, 2.0], True)
    """
    name = "eigvalsh_top"
    if which not in WHICH:
        raise InputError(f"{name}: which must be one of {', '.join(WHICH)}, got {which!r}")
    dense = isinstance(a, Tensor) and is_dense(a)
    linear = as_linear_map(name, a)
    n = linear.shape[-1]
    if linear.shape[-2] != n:
        raise ShapeError(f"{name}: expected symmetric (..., n, n), got {tuple(linear.shape)}. See gm.linalg.svdvals.")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
        raise InputError(f"{name}: k must be a whole number from 1 to n = {n}, got {k!r}")
    if dense:
        assert isinstance(a, Tensor)
        return _by_eigh(check(name, a, square=True), k, which, default_rtol(rtol, a.dtype))
    return _by_lanczos(linear, k, which, default_rtol(rtol, getattr(linear, "dtype", torch.float32)), generator)


def eigvalsh_top(
    a: Float[Tensor, "*b n n"] | LinearMap,
    k: int,
    *,
    which: Which = "magnitude",
    rtol: float | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*b k"]:
    """The k outermost eigenvalues of a symmetric matrix or linear map, with their signs, the outermost first.

    Args:
        a: `(..., n, n)` dense symmetric, a sparse matrix `(n, n)`, or a symmetric `LinearMap` such as
            `gm.operators.hessian`.
        k: how many, from 1 to n; an eigenvalue counts as often as it is repeated.
        which: "magnitude", by absolute value; "largest" or "smallest", by value.
        rtol: the error asked for, relative to the norm of the k values together; `certificate.RTOL` of the dtype if
            None. Of values of very different sizes the small ones may be less accurate.
        generator: of the random start; a fixed seed if None.
    Returns: the eigenvalues `(..., k)` in the dtype of `a`.
    Raises:
        ShapeError, DtypeError, InputError: for arguments that are not as above.
        ConvergenceError: where the matrix holds NaN, is not symmetric, or the error is above rtol after 1000 products.
    Cost: one eigendecomposition in float64 if dense (the certificate is three norms: there is nothing to leave out);
        else about k products a step in 10 to 40 steps, 8n bytes each, and
        k more for the residual. Accuracy: there are k eigenvalues within √2 ‖AV − VΘ‖_F. That no other lies further
        out is almost sure once they have converged, and not proven: the certificate is an estimate. The recurrence is
        in float64; float32 products limit the answer to about 1e-6 ‖A‖.
    Source: Golub and Underwood (1977); Parlett, The Symmetric Eigenvalue Problem (1998), §11.5.

    >>> eigvalsh_top(torch.diag(torch.tensor([1.0, -3.0, 2.0])).to_sparse_csr(), 2)
    tensor([-3.,  2.])
    """
    value, certificate = eigvalsh_top_ex(a, k, which=which, rtol=rtol, generator=generator)
    require_converged("eigvalsh_top", certificate)
    return value
