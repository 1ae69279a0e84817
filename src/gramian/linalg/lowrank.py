"""The best approximation of low rank, by block Krylov with a bound on what it misses, or by the SVD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg import singular_derivatives
from gramian.linalg.certificate import Certificate, default_rtol, require_converged, verdict
from gramian.linalg.engine import lapack, probes
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import eye_like, minus, pair, rough, transpose
from gramian.linalg.engine.escalation import climb
from gramian.linalg.engine.krylov import by, default_generator, forth_and_back, random_rows
from gramian.linalg.engine.loading import check, choose, load, unscaled
from gramian.linalg.engine.lowrank_krylov import Caller, Found, Products, by_products, excess
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.linear_map import LinearMap, ScaledMap, TensorMap, as_linear_map, is_dense, scaled_map

SMALL = 96
"""Up to this smaller side the SVD costs less than the Krylov method's calls."""
SHARE = 4
"""Past rank n/4 the Krylov space is so large a part of the whole that the SVD costs less."""
NARROW = 5e-5
"""The rtol from which the factors are sought in float32."""


def _svd_error(x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """A bound on ‖σ(A) − s‖₂: ‖A − USVᵀ‖_F (Mirsky) and the defects of U and V."""
    gap, error = minus(pair(x), rough(pair(u * s[:, None, :]), transpose(pair(v))))
    error = error + norm(gap) + 2 * U * norm(s)
    for vectors in (u, v):
        f, f_error = minus(rough(transpose(pair(vectors)), pair(vectors)), eye_like(vectors))
        error = error + (norm(f) + f_error) * norm(s)
    return error


def _by_svd(
    x: Tensor, k: int, caller: Caller, *, rtol: float, generator: torch.Generator | None, certify: bool = True
) -> Found:
    """The leading part of the full SVD."""
    x = x.to(torch.float64)
    u, s, v, ok = lapack.svd(x)
    value, factors = caller.rounded(u[..., :k], s[:, :k], v[..., :k])
    if not certify:
        return Found.bare(value, torch.where(ok, cert.NONE, cert.LAPACK))
    spread = _svd_error(x, u, s, v)
    # ‖σ̂ − σ‖₂ is at most `spread` (Mirsky).
    optimum = (norm(s[:, k:]) - spread).clamp_min(0)
    unit = gamma(x.shape[-1] + x.shape[-2])
    bound, left = excess(factors, x @ factors[2], 0.0, norm(x) ** 2, optimum, unit, x)
    return Found(value, bound, left, torch.where(ok, cert.NONE, cert.LAPACK))


def _by_block_krylov(
    x: Tensor, k: int, caller: Caller, *, rtol: float, generator: torch.Generator | None, certify: bool = True
) -> Found:
    """`lowrank_krylov.by_products` of dense matrices, with products in x's dtype."""
    ops = Products(
        forth=lambda y: by(y, x.mT),
        both=lambda y: forth_and_back(y, x),
        twice=lambda z: probes.twice(x, z),
        like=x,
        shape=(x.shape[0], x.shape[1], x.shape[2]),
        unit=gamma(x.shape[-1] + x.shape[-2]),
        dense=x,
    )
    return by_products(ops, k, caller, rtol=rtol, generator=generator, certify=certify)


Factors = tuple[Tensor, ...]
SVD_LOWRANK: dict[str, Callable[..., Found]] = {"block_krylov": _by_block_krylov, "svd": _by_svd}
METHODS = tuple(SVD_LOWRANK)


def _of_map(
    a: Any, rank: int, rtol: float | None, generator: torch.Generator | None, certify: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Certificate]:
    """`svd_lowrank_ex` of a map, in float64 except for its own products; ‖A‖_F is known only for a sparse tensor."""
    dtype, device = getattr(a, "dtype", torch.float32), torch.device(getattr(a, "device", "cpu"))
    tolerance = default_rtol(rtol, dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32)
    sparse, wide = isinstance(a, TensorMap), a.shape[0] < a.shape[1]
    if isinstance(a, TensorMap):
        a = TensorMap(a.a.to(torch.float64))
    values = a.a.values() if isinstance(a, TensorMap) else None
    a = a.adjoint() if wide else a
    m, n = a.shape
    zero = torch.zeros(1, dtype=torch.float64, device=device)
    like, source = zero[:0, None, None], default_generator(generator)
    nothing = torch.zeros(1, m, rank, dtype=dtype, device=device), zero[:, None].expand(1, rank).to(dtype)
    found = Found((*nothing, nothing[0].new_zeros(1, n, rank)), zero, zero + 1, torch.full_like(zero, cert.NONE).long())
    finite = True
    # A map that computes in float32 is linear only up to its rounding.
    rounding = 0.0 if sparse or not rank else 32 * torch.finfo(dtype).eps
    if rank:
        scaled, exponent, finite = scaled_map(a, random_rows(source, like, 1, min(n, 8), n))
        back = scaled.adjoint()
        square = None if values is None else norm(values[None] * scaled.factor) ** 2

        def product(of: ScaledMap, y: Tensor) -> Tensor:
            nonlocal finite
            image = of.matmat(y[0].mT).mT[None]
            good = bool(image.isfinite().all())
            finite = finite and good
            return image if good else torch.zeros_like(image)

        def both(y: Tensor) -> tuple[Tensor, Tensor]:
            image = product(scaled, y)
            return image, product(back, image)

        def twice(z: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            image, again = both(z)
            return again, image, square

        ops = Products(lambda y: product(scaled, y), both, twice, like, (1, m, n), gamma(m + n))
        caller = Caller(dtype, exponent.to(device))
        finite = finite and (values is None or bool(values.isfinite().all()))
        for again in (False, True) if finite else ():
            # There is no SVD to fall back on. The second run has a wider block, for multiple eigenvalues.
            asked = tolerance / 8 if again else tolerance
            found = by_products(ops, rank, caller, rtol=asked, generator=source, wide=again, certify=certify)
            if not finite or not certify or bool((found.excess + rounding <= tolerance).all()):
                break
    bound = found.excess + rounding
    reason = found.reason if finite else torch.full_like(found.reason, cert.NOT_FINITE)
    reason = reason if certify else torch.where(reason == cert.NONE, cert.UNASKED, reason)
    proof = verdict(
        bound,
        tolerance,
        reason,
        shape=(),
        methods=METHODS,
        code=METHODS.index("block_krylov"),
        residual=found.residual,
        steps=found.steps,
        failure_probability=found.failure if rank else None,
    )
    u, s, v = (y[0] if finite else torch.full_like(y[0], math.nan) for y in found.value)
    return ((v, s, u) if wide else (u, s, v)), proof


def _empty_factors(a: Tensor, rank: int, **_: Any) -> Factors:
    shapes = (a.shape[-2], rank), (rank,), (a.shape[-1], rank)
    return tuple(a.new_empty(*a.shape[:-2], *shape) for shape in shapes)


@differentiable(singular_derivatives.LOWRANK, shapes=_empty_factors, methods=METHODS, a=2)
def svd_lowrank_ex(
    a: Float[Tensor, "*b m n"] | LinearMap,
    rank: int,
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[tuple[Float[Tensor, "*b m k"], Float[Tensor, "*b k"], Float[Tensor, "*b n k"]], Certificate]:
    """`svd_lowrank` with its certificate, never raising for a matrix's values.

    Args:
        a, rank, method, rtol, certify, generator: as for `svd_lowrank`.
    Returns: the factors and their `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `svd_lowrank`.
    Source: as for `svd_lowrank`.

    >>> (u, s, v), certificate = svd_lowrank_ex(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    >>> s.tolist(), certificate.converged.item()
    ([3.0, 2.0], True)
    """
    choose("svd_lowrank", method, SVD_LOWRANK)
    dense = isinstance(a, Tensor) and is_dense(a)
    linear = check("svd_lowrank", a) if dense else as_linear_map("svd_lowrank", a)
    short = min(linear.shape[-2:])
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= short:
        raise InputError(f"svd_lowrank: expected an integer rank from 0 to min(m, n) = {short}, got {rank!r}.")
    if not isinstance(linear, Tensor):
        if method == "svd":
            raise InputError("svd_lowrank: 'svd' wants a dense tensor. Use method='block_krylov' or a.to_dense().")
        return _of_map(linear, rank, rtol, generator, certify)
    a = linear
    wide = a.shape[-2] < a.shape[-1]
    loaded, tolerance = unscaled(load(a.mT if wide else a)), default_rtol(rtol, a.dtype)
    names = [method]
    if method == "auto":
        names = ["svd"] if short <= SMALL or SHARE * rank > short else ["block_krylov", "svd"]
    if not rank:
        names = ["svd"]
    narrow = a.dtype != torch.float64 and tolerance >= NARROW and names[0] == "block_krylov"
    rungs = [(names[0], None)] * narrow + [(name, torch.float64) for name in names]

    def attempt(rung: tuple[str, torch.dtype | None], rows: Tensor | None, last: bool) -> tuple[Factors, Certificate]:
        name, work = rung
        part = loaded.rows(rows)
        caller = Caller(a.dtype, part.exponent)
        found = SVD_LOWRANK[name](part.at(work), rank, caller, rtol=tolerance, generator=generator, certify=certify)
        lost = ~part.finite
        reason = found.reason if certify else torch.where(found.reason == cert.NONE, cert.UNASKED, found.reason)
        value = tuple(torch.where(lost.reshape(-1, *[1] * (y.ndim - 1)), math.nan, y) for y in found.value)
        return value, verdict(
            found.excess,
            tolerance,
            torch.where(lost, cert.NOT_FINITE, reason),
            methods=METHODS,
            code=METHODS.index(name),
            residual=found.residual,
            steps=found.steps,
            failure_probability=found.failure,
        )

    (u, s, v), proof = climb(rungs, attempt)
    u, s, v = (y.reshape(loaded.shape + y.shape[1:]) for y in (u, s, v))
    return ((v, s, u) if wide else (u, s, v)), proof.reshape(loaded.shape)


def svd_lowrank(
    a: Float[Tensor, "*b m n"] | LinearMap,
    rank: int,
    *,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "*b m k"], Float[Tensor, "*b k"], Float[Tensor, "*b n k"]]:
    """The best approximation of rank k, as U (m, k), S (k,), V (n, k), in the convention of `torch.svd_lowrank`.

    A ≈ U diag(S) Vᵀ, the minimizer of ‖A − B‖_F over B of rank ≤ k.

    Args:
        a: `(..., m, n)` dense, a sparse matrix `(m, n)`, or a `LinearMap`.
        rank: k, from 0 to min(m, n).
        method: "block_krylov", "svd" or "auto".
        rtol: the excess (‖A − USVᵀ‖_F − optimum) / ‖A‖_F asked for; `certificate.RTOL` of the dtype if None, and at
            least 1e-4 for sparse matrices and maps. The certificate's `error_bound` bounds this excess, since the
            factors themselves are not unique.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
        generator: of the random start; one of a fixed seed if None.
    Returns: U `(..., m, k)`, S `(..., k)` descending, V `(..., n, k)`.
    Raises:
        ShapeError: where `a` has fewer than two dimensions.
        DtypeError: where `a` is not real floating point, or not a map.
        InputError: for an unknown method, a rank out of range, a negative rtol, or "svd" of a map.
        ConvergenceError: where the excess may be above rtol.
    Cost: "block_krylov" takes products with about 4k vectors for slow decay and 2k for fast, in float32 where its
    rounding leaves room for rtol, and a float64 pass with 24 vectors to bound that rounding. "svd" takes one float64
    SVD (about 50 products); "auto" uses it up to a side of 96, for k > n/4, and where the other is not certified.
    Accuracy: the excess is bounded from ‖A‖_F² − Σ sᵢ², so it is resolved down to about 1e-7 of ‖A‖_F, unless all that
    is missed is below that. The bound of "block_krylov" is an estimate that fails with probability 5 `krylov.FAILURE`.
    The certificate's residual is ‖A − USVᵀ‖_F / ‖A‖_F.

    Sparse matrices and maps: "block_krylov" in float64, never the SVD. ‖A‖_F of a map is unknown, but it cancels from
    the excess of the squares; a lower bound on it, from 32 more products (6 `krylov.FAILURE` then), turns that into an
    excess, and the residual is an estimate. The products of a map are taken as exact; a map in float32 is rarely
    certified where less than 1e-2 is missed.
    Source: Musco and Musco, arXiv:1504.05477, algorithm 2; the bound, Bhatia, Matrix Analysis (1997), §III.2.

    >>> u, s, v = svd_lowrank(torch.tensor([[2.0, 2.0], [2.0, 2.0]]), 1)
    >>> s
    tensor([4.])
    """
    value, certificate = svd_lowrank_ex(a, rank, method=method, rtol=rtol, certify=certify, generator=generator)
    require_converged("svd_lowrank", certificate)
    return value
