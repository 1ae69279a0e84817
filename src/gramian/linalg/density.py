"""The spectral radius of any square matrix, and the density of a symmetric one's eigenvalues."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import ShapeError
from gramian.linalg import certificate as cert
from gramian.linalg.certificate import Certificate, default_rtol, require_converged, verdict
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable, refused
from gramian.linalg.engine.escalation import Number, numbers
from gramian.linalg.engine.krylov import default_generator, gaussian, lanczos, ritz_pairs
from gramian.linalg.engine.loading import check, choose, load
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.scaling import scale
from gramian.linalg.linear_map import LinearMap, ScaledMap, as_linear_map, is_dense, made_dense
from gramian.linalg.scaled import matrix_power_scaled_ex

GELFAND = 2**30
"""k of ‖Aᵏ‖^(1/k): even κ(V) = 1e16 then leaves a factor of 1 + 4e-8."""


def radius_by_eigenvalues(x: Tensor, *, rtol: float) -> Number:
    """The largest |eigenvalue|: of a triangular A on its diagonal, else bounded by Gershgorin's discs of A in its
    eigenvectors' basis, which a Jordan block does not have."""
    n = x.shape[-1]
    value, error = x.new_zeros(x.shape[0]), x.new_full((x.shape[0],), math.inf)
    reason = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    if not n:
        return Number(value, value, reason)
    try:
        _, v = torch.linalg.eig(x)
    except lapack.LinAlgError:
        return Number(value, error, torch.full_like(reason, cert.INACCURATE))
    symmetric = (x == x.mT).flatten(1).all(1)
    if bool(symmetric.any()):
        v[symmetric] = lapack.eigh(x[symmetric])[1].to(v.dtype)
    w, info = lapack.inverse(v)
    y = w @ x.to(v.dtype) @ v
    sizes = (w.flatten(1).norm(dim=1), v.flatten(1).norm(dim=1))
    eye = torch.eye(n, dtype=v.dtype, device=v.device)
    defect = (w @ v - eye).flatten(1).norm(dim=1) + 16 * gamma(n) * sizes[0] * sizes[1]
    # W A W⁻¹ = Y (WV)⁻¹: so far is Y from a matrix similar to A.
    blur = 16 * gamma(n + 4) * sizes[0] * norm(x) * sizes[1]
    blur = blur + y.flatten(1).norm(dim=1) * defect / (1 - defect).clamp_min(2.0**-60)
    center = y.diagonal(dim1=-2, dim2=-1).abs()
    radii = (y - torch.diag_embed(y.diagonal(dim1=-2, dim2=-1))).abs().sum(-1) + blur[:, None]
    value = center.amax(-1)
    # The discs that touch the outermost hold as many eigenvalues as there are of them, none further in than their sum.
    error = torch.maximum((center + radii).amax(-1) - value, 2 * radii.sum(-1))
    good = (info == 0) & (defect < 0.5)
    triangular = (x == x.triu()).flatten(1).all(1) | (x == x.tril()).flatten(1).all(1)
    value = torch.where(triangular, x.diagonal(dim1=-2, dim2=-1).abs().amax(-1), value.nan_to_num(nan=0.0))
    return Number(value, torch.where(triangular, 0.0, torch.where(good, error, math.inf)), reason)


def radius_by_gelfand(x: Tensor, *, rtol: float) -> Number:
    """ρ ≤ ‖Aᵏ‖^(1/k) and ρ ≥ (|tr Aᵏ|/n)^(1/k), by squaring in logarithmic scale."""
    n = x.shape[-1]
    (mantissa, log_scale), proof = matrix_power_scaled_ex(x, GELFAND, rtol=math.inf)
    blur = proof.error_bound
    high = ((log_scale + torch.log1p(blur)) / GELFAND).exp()
    trace = mantissa.diagonal(dim1=-2, dim2=-1).sum(-1).abs() - math.sqrt(n) * blur - 4 * n * U
    low = ((log_scale + (trace.clamp_min(0) / max(n, 1)).log()) / GELFAND).exp()
    zero = (log_scale == -math.inf) & (blur == 0)
    high, low = torch.where(zero, 0.0, high), torch.where(zero, 0.0, low.nan_to_num(nan=0.0))
    value = (high + low) / 2
    if not bool((zero | (low > 0)).all()):
        # Nothing is proven from below: LAPACK's eigenvalues are as good as any.
        w, ok = lapack.eigvals(x)
        value = torch.where(~zero & ok & (low == 0), w.abs().amax(-1).minimum(high), value)
    error = torch.maximum(high - value, value - low) + 4 * U * high
    error = torch.where(zero, 0.0, error).nan_to_num(nan=math.inf)
    value = value.nan_to_num(nan=0.0)
    return Number(value, error, torch.zeros_like(proof.reason), 30)


SPECTRAL_RADIUS = {"eigenvalues": radius_by_eigenvalues, "gelfand": radius_by_gelfand}


@differentiable(
    refused("spectral_radius", "Bound it by spectral_norm, which has one."),
    shapes=lambda m, **_: m.new_empty(m.shape[:-2]),
    methods=SPECTRAL_RADIUS,
    m=2,
)
def spectral_radius_ex(
    m: Float[Tensor, "*b n n"] | LinearMap, *, method: str = "auto", rtol: float | None = None
) -> tuple[Float[Tensor, "*b"], Certificate]:
    """`spectral_radius` with its certificate, never raising for a matrix's values.

    Args:
        m: `(..., n, n)` dense, a sparse matrix `(n, n)`, or a `LinearMap`.
        method: one of `SPECTRAL_RADIUS` or "auto".
        rtol: the relative error asked for; `certificate.RTOL` of the dtype if None.
    Returns: the radii `(...)`, and their certificate; its residual is 0.
    Raises: `ShapeError`, `DtypeError`, `InputError`.
    Cost: as `spectral_radius`.
    Source: Horn and Johnson, Matrix Analysis (2013), theorem 6.1.1 and corollary 5.6.14.

    >>> value, certificate = spectral_radius_ex(torch.tensor([[0.0, 1.0], [-4.0, 0.0]]))
    >>> round(value.item(), 5), certificate.converged.item()
    (2.0, True)
    """
    if not (isinstance(m, Tensor) and is_dense(m)) and len(set(as_linear_map("spectral_radius", m).shape)) != 1:
        raise ShapeError(f"spectral_radius: expected a square map (n, n), got {tuple(m.shape)}. See gm.linalg.svdvals.")
    m = check("spectral_radius", made_dense("spectral_radius", m), square=True)
    choose("spectral_radius", method, SPECTRAL_RADIUS)
    batch = load(m)
    return numbers(
        SPECTRAL_RADIUS,
        list(SPECTRAL_RADIUS) if method == "auto" else [method],
        default_rtol(rtol, m.dtype),
        m.dtype,
        batch.x,
        batch.finite,
        batch.shape,
        lambda value, rows: scale(value, batch.exponent[rows]),
    )


def spectral_radius(
    m: Float[Tensor, "*b n n"] | LinearMap, *, method: str = "auto", rtol: float | None = None
) -> Float[Tensor, "*b"]:
    """The largest absolute value of an eigenvalue, ρ(M) = max |λᵢ(M)|; M need not be symmetric.

    A sparse matrix or a map is first made dense by n products, since no few products bound the eigenvalues of a matrix
    that is not symmetric.

    Args:
        m: `(..., n, n)` dense, a sparse matrix `(n, n)`, or a `LinearMap`.
        method: one of `SPECTRAL_RADIUS` or "auto".
        rtol: the relative error asked for; `certificate.RTOL` of the dtype if None.
    Returns: the radii `(...)` in the dtype of `m`.
    Raises:
        ShapeError, DtypeError, InputError: for arguments that are not as above.
        ConvergenceError: where the error bound is above rtol.
    Cost: "eigenvalues", one nonsymmetric eigendecomposition in float64 (about 25 products); "gelfand", which "auto"
    takes where the eigenvectors are dependent, 30 squarings in double-double. The value is made of its bounds, so that
    there is no certificate to leave out. Accuracy: n u κ(V); a bound, not an estimate. A triangular matrix is exact,
    Jordan blocks included; of one in another basis float64 knows little, and the certificate says so.
    Source: Horn and Johnson, Matrix Analysis (2013), theorem 6.1.1 and corollary 5.6.14.

    >>> spectral_radius(torch.tensor([[2.0, 100.0], [0.0, 1.0]]))
    tensor(2.)
    """
    value, certificate = spectral_radius_ex(m, method=method, rtol=rtol)
    require_converged("spectral_radius", certificate)
    return value


class SpectralDensity(NamedTuple):
    """A distribution of eigenvalues, Σ wᵢ δ(λ − xᵢ).

    Attributes:
        nodes: xᵢ `(..., p)`, ascending.
        weights: wᵢ `(..., p)`, which sum to 1.
    """

    nodes: Tensor
    weights: Tensor


DENSITY = ("eigvalsh", "lanczos_quadrature")
FEW = 2048
"""Up to this size all eigenvalues cost little more than the quadrature, and their error is rounding."""
SAMPLING = 1e-6
"""The probability with which the sampling's error exceeds its bound."""
STEPS, PROBES = 40, 10


def _by_quadrature(linear: Any, n: int, source: torch.Generator, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nodes and weights of Gauss's rule for each of `PROBES` random vectors, a bound on W₁, and the range."""
    start = gaussian(source, like, PROBES, 1, n)

    def apply(y: Tensor) -> Tensor:
        return linear.matmat(y[:, 0].mT.contiguous()).mT[:, None]

    found = lanczos(apply, start, min(STEPS, n))
    nodes, s, _ = ritz_pairs(found)
    weights = s[:, 0, :] ** 2
    # Chebyshev, Markov, Stieltjes: between two nodes the true distribution is off by at most the nearer weights.
    tail = norm(found.residual)
    low, high = (nodes[:, 0] - tail).amin(), (nodes[:, -1] + tail).amax()
    inner = ((nodes[:, 1:] - nodes[:, :-1]) * torch.maximum(weights[:, 1:], weights[:, :-1])).sum(-1)
    edges = (nodes[:, 0] - low) * weights[:, 0] + (high - nodes[:, -1]) * weights[:, -1]
    quadrature = torch.where(tail > 1e-12 * (high - low).abs(), inner + edges, 0.0).mean()
    spread = high - low
    sampling = spread * math.sqrt(4 * math.log(2 * n / SAMPLING) / ((n + 2) * PROBES))
    order = nodes.flatten().argsort()
    return nodes.flatten()[order], (weights.flatten() / PROBES)[order], quadrature + sampling, spread


def _empty_density(a: Tensor, method: str, **_: Any) -> SpectralDensity:
    n = a.shape[-1]
    quadrature = n > FEW if method == "auto" else method == "lanczos_quadrature"
    nodes = a.new_empty(*a.shape[:-2], PROBES * min(STEPS, n) if quadrature else n, dtype=torch.float64)
    return SpectralDensity(nodes, torch.empty_like(nodes))


@differentiable(
    refused("spectral_density", "Differentiate svdvals of a dense matrix."),
    shapes=_empty_density,
    methods=DENSITY,
    made=SpectralDensity,
    a=2,
)
def spectral_density_ex(
    a: Float[Tensor, "*b n n"] | LinearMap,
    *,
    method: str = "auto",
    rtol: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[SpectralDensity, Certificate]:
    """`spectral_density` with its certificate, never raising for a matrix's values.

    Args:
        a: `(..., n, n)` dense symmetric, a sparse matrix `(n, n)`, or a symmetric `LinearMap`.
        method: one of `DENSITY` or "auto".
        rtol: the Wasserstein-1 distance asked for, relative to λ_max − λ_min; 0.2 if None.
        generator: of the random vectors; a fixed seed if None.
    Returns: the `SpectralDensity`, and its certificate; its residual is 0.
    Raises: `ShapeError`, `DtypeError`, `InputError`.
    Cost: as `spectral_density`.
    Source: Chen, Trogdon, Ubaru, arXiv:2105.06595, theorem 1 and §3.

    >>> density, certificate = spectral_density_ex(torch.diag(torch.tensor([3.0, 1.0])))
    >>> density.nodes.tolist(), density.weights.tolist(), certificate.converged.item()
    ([1.0, 3.0], [0.5, 0.5], True)
    """
    name = "spectral_density"
    choose(name, method, dict.fromkeys(DENSITY))
    tolerance = 0.2 if rtol is None else default_rtol(rtol, torch.float64)
    dense = isinstance(a, Tensor) and is_dense(a)
    linear = as_linear_map(name, a)
    n = linear.shape[-1]
    if linear.shape[-2] != n:
        raise ShapeError(f"{name}: expected symmetric (..., n, n), got {tuple(linear.shape)}. Pass gm.linalg.syrk(a).")
    source = default_generator(generator)
    if not dense and method != "lanczos_quadrature" and (n <= STEPS * PROBES or method == "eigvalsh"):
        # The quadrature would take more products. The rounding of a map's products is no asymmetry.
        a = made_dense(name, linear).double()
        a, dense = (a + a.mT) / 2, True
    if not dense:
        own = ScaledMap(linear)
        like = torch.empty(0, dtype=torch.float64, device=own.device)
        finite = bool(own.matmat(gaussian(source, like, n, 1)).isfinite().all())
        reason = torch.tensor([cert.NONE if finite else cert.NOT_FINITE], device="cpu")
        if not finite or not n:
            empty = like.new_full((n and 1,), math.nan)
            return SpectralDensity(empty, empty), verdict(
                like.new_zeros(1), tolerance, reason, shape=(), methods=DENSITY, code=1
            )
        nodes, weights, error, spread = _by_quadrature(own, n, source, like)
        bound = torch.where(error == 0, 0.0, error / spread)[None]
        return SpectralDensity(nodes, weights), verdict(
            bound, tolerance, reason, shape=(), methods=DENSITY, code=1, steps=STEPS, failure_probability=SAMPLING
        )
    assert isinstance(a, Tensor)
    batch = load(a)
    apart = norm(batch.x - batch.x.mT)
    uneven = apart > 10 * n * torch.finfo(a.dtype).eps * norm(batch.x)
    x = (batch.x + batch.x.mT) / 2
    reason = torch.where(uneven, cert.NOT_SYMMETRIC, cert.NONE)
    quadrature = n > FEW if method == "auto" else method == "lanczos_quadrature"
    if quadrature and n:
        parts = [_by_quadrature(ScaledMap(as_linear_map(name, y)), n, source, y) for y in x]
        nodes, weights = (
            torch.stack([p[i] for p in parts]) if parts else x.new_zeros(0, PROBES * min(STEPS, n)) for i in (0, 1)
        )
        bound = torch.stack([p[2] / p[3] if bool(p[2] > 0) else p[2] * 0 for p in parts]) if parts else x.new_zeros(0)
    else:
        nodes, _, ok = lapack.eigh(x)
        weights = torch.full_like(nodes, 1 / max(n, 1))
        reason = torch.where(ok, reason, cert.LAPACK)
        spread = nodes[:, -1] - nodes[:, 0] if n else apart
        error = 10 * n * U * norm(x) + apart
        # One node, or a multiple of I: the range is 0, and the values are right to rounding.
        bound = torch.where(spread > error, error / spread, 0.0) if n else apart * 0
    reason = torch.where(batch.finite, reason, cert.NOT_FINITE)
    nodes = torch.where(batch.finite[:, None], scale(nodes, batch.exponent), math.nan)
    proof = verdict(
        bound,
        tolerance,
        reason,
        shape=batch.shape,
        methods=DENSITY,
        code=int(quadrature),
        steps=STEPS if quadrature else 0,
        failure_probability=SAMPLING if quadrature else None,
    )
    nodes, weights = (y.reshape(*batch.shape, y.shape[-1]) for y in (nodes, weights))
    return SpectralDensity(nodes, weights), proof


def spectral_density(
    a: Float[Tensor, "*b n n"] | LinearMap,
    *,
    method: str = "auto",
    rtol: float | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """The distribution of the eigenvalues of a symmetric matrix or linear map, as nodes and weights.

    (1/n) Σ δ(λ − λᵢ) ≈ Σ wⱼ δ(λ − xⱼ).

    Args:
        a: `(..., n, n)` dense symmetric, a sparse matrix `(n, n)`, or a symmetric `LinearMap`; the symmetry of a map is
            not checked.
        method: one of `DENSITY` or "auto".
        rtol: the Wasserstein-1 distance asked for, relative to λ_max − λ_min; 0.2 if None.
        generator: of the random vectors; a fixed seed if None.
    Returns: a `SpectralDensity` in float64.
    Raises:
        ShapeError, DtypeError, InputError: for arguments that are not as above.
        ConvergenceError: where the matrix is not symmetric or the error is above rtol.
    Cost: "eigvalsh", up to n = 2048, one eigendecomposition in float64, of a sparse matrix or a map up to n = 400 and
    after n products; "lanczos_quadrature", 40 products with 10 vectors. Accuracy: the bound adds the error of the
    quadrature (Chebyshev–Markov–Stieltjes, from the weights) and that of the sampling, which fails with probability
    `SAMPLING`.
    Source: Chen, Trogdon, Ubaru, arXiv:2105.06595, theorem 1 and §3.

    >>> spectral_density(torch.eye(2)).nodes.tolist()
    [1.0, 1.0]
    """
    value, certificate = spectral_density_ex(a, method=method, rtol=rtol, generator=generator)
    require_converged("spectral_density", certificate)
    return value
