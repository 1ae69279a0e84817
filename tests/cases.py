"""Tables of matrices, and oracles in higher precision, that the tests of gramian.linalg share.

`hostile` is frozen: certificates are scored on it with fresh seeds, so tuning it to the code would void the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import jaxtyping
import mpmath
import torch
from torch import Tensor

import gramian.linalg as gl
from gramian import random
from gramian.linalg.engine.function import FUNCTIONS as REGISTRY
from gramian.linalg.engine.function import Options, examples

mpmath.mp.dps = 60
WIDE = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@contextmanager
def untyped() -> Iterator[None]:
    """Switches jaxtyping's own checks off, where the test is of the library's: they would raise first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


class Map:
    """A matrix that shows only what it does to vectors."""

    def __init__(self, a):
        self.a, self.shape, self.dtype = a, tuple(a.shape), a.dtype

    def matvec(self, x):
        return self.a @ x

    def matmat(self, x):
        return self.a @ x

    def adjoint(self):
        return Map(self.a.mT)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the gallery -----------------------------------------------------------------------------------------------------


def hilbert(n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return 1 / (i[:, None] + i - 1)


def lotkin(n: int) -> Tensor:
    a = hilbert(n)
    a[0] = 1
    return a


def moler(n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return torch.minimum(i[:, None], i) - 2 + torch.diag(torch.full((n,), 2.0, dtype=torch.float64))


def kahan(n: int, angle: float = 1.2) -> Tensor:
    s, c = math.sin(angle), math.cos(angle)
    upper = torch.eye(n, dtype=torch.float64) - c * torch.ones(n, n, dtype=torch.float64).triu(1)
    return torch.diag(s ** torch.arange(n, dtype=torch.float64)) @ upper


def rank_deficient(n: int) -> Tensor:
    """Integers, so that it is exactly so in every dtype."""
    i = torch.arange(n, dtype=torch.float64)
    return i[:, None] % 3 * (i % 2 + 1) + 1.0


def repeated(n: int) -> Tensor:
    x = random.orthogonal(n, n, generator=seeded(1), dtype=torch.float64)
    return (x * torch.tensor([2.0 if i < n // 2 else 1.0 for i in range(n)], dtype=torch.float64)) @ x.mT


SQUARE = {
    "hilbert": hilbert,
    "lotkin": lotkin,
    "moler": moler,
    "kahan": kahan,
    "rank_deficient": rank_deficient,
    "repeated": repeated,
    "identity": lambda n: torch.eye(n, dtype=torch.float64),
    "zero": lambda n: torch.zeros(n, n, dtype=torch.float64),
    "huge": lambda n: 1e30 * moler(n),
    "tiny": lambda n: 1e-30 * moler(n),
    "nan": lambda n: torch.full((n, n), math.nan, dtype=torch.float64),
    "inf": lambda n: hilbert(n).fill_diagonal_(math.inf),
}
SHAPES = [(5, 1), (1, 5), (1, 1), (0, 4), (4, 0), (0, 0), (0, 3, 3), (2, 0, 6, 3), (2, 3, 7, 3), (3, 3, 7)]


# --- hostile random matrices -----------------------------------------------------------------------------------------


def _spectrum(n: int, pick: float, kappa: float, u: Tensor) -> Tensor:
    grid = torch.linspace(0, 1, n, dtype=torch.float64)
    kinds = (
        kappa**-grid,
        torch.where(grid < 0.5, 1.0, 1 / kappa),
        kappa ** -u.sort().values,
        torch.where(grid < 1, 1.0, 1 / kappa),
        torch.where(grid > 0, 1 / kappa, 1.0),
        1 - grid * (1 - 1 / kappa),
    )
    return kinds[min(int(pick * len(kinds)), len(kinds) - 1)]


def hostile(seed: int, count: int, m: int, n: int, dtype: torch.dtype, *, psd: bool) -> Tensor:
    """`count` matrices (m, n): conditioned to 1e16, clustered, graded, deficient, scaled by 1e±30, some not finite."""
    g = seeded(seed)
    out = []
    for _ in range(count):
        u = random.uniform(6, generator=g, dtype=torch.float64).tolist()
        kappa = 10 ** (16 * u[0])
        k = min(m, n)
        s = _spectrum(k, u[1], kappa, random.uniform(k, generator=g, dtype=torch.float64))
        a = random.with_spectrum(m, n, spectrum=s, symmetric=psd, generator=g, dtype=torch.float64)
        if u[2] < 0.10:
            rows = random.normal(max(1, k // 2), n, generator=g, dtype=torch.float64)
            a = rows.mT @ rows if psd else random.normal(m, max(1, k // 2), generator=g, dtype=torch.float64) @ rows
        elif u[2] < 0.18:
            d = 10 ** (-8 * random.uniform(n, generator=g, dtype=torch.float64))
            a = d[:, None] * a * d if psd else a * d
        elif u[2] < 0.24 and m == n:
            a = (hilbert, moler, lotkin, kahan)[int(u[3] * (2 if psd else 4))](n)
        elif u[2] < 0.28:
            a = (4 * a / a.abs().max()).round()
        a = a * 10 ** (60 * u[4] - 30) if u[2] > 0.6 else a
        a = (a + a.mT) / 2 if psd else a
        a = a.to(dtype)
        if u[5] < 0.03:
            a[0, 0] = math.nan if u[5] < 0.015 else math.inf
        out.append(a)
    return torch.stack(out)


def indefinite(a: Tensor) -> Tensor:
    """Symmetric matrices (..., n, n) with the sign of every other eigenvalue flipped; unchanged where not finite."""
    finite = a.isfinite().flatten(-2).all(-1)[..., None, None]
    w, v = torch.linalg.eigh(torch.where(finite, a.to(torch.float64), 0.0))
    flipped = (v * w[..., None, :] * (-1.0) ** torch.arange(w.shape[-1])) @ v.mT
    return torch.where(finite, (flipped + flipped.mT).to(a.dtype) / 2, a)


def hostile_for(needs: str, seed: int, count: int, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """`hostile` for functions of "general", "square", "psd" or "symmetric" matrices: the last half indefinite."""
    a = hostile(seed, count, m, n, dtype, psd=needs in ("psd", "symmetric"))
    if needs == "symmetric":
        a[1::2] = indefinite(a[1::2])
    return a


def gallery_for(needs: str, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gallery for such functions: symmetric parts for the last two, and for "symmetric" indefinite ones too."""
    matrices = {name: make(n).to(dtype) for name, make in SQUARE.items()}
    if needs in ("psd", "symmetric"):
        matrices = {name: a if bool(a.isnan().any()) else (a + a.mT) / 2 for name, a in matrices.items()}
    if needs == "symmetric":
        matrices |= {f"indefinite {name}": indefinite(a) for name, a in matrices.items()}
    return matrices


# --- oracles ---------------------------------------------------------------------------------------------------------


Entries = tuple[tuple[float, ...], ...]


def entries(x: Tensor) -> Entries:
    """The matrix as what a cache can look up."""
    return tuple(map(tuple, x.to(torch.float64).tolist()))


def mp(x: Tensor) -> mpmath.matrix:
    """The matrix exactly, in 60 digits."""
    return mpmath.matrix(entries(x))


def mp_error(value: Tensor, exact: mpmath.matrix | None) -> float:
    """‖value − exact‖_F / ‖exact‖_F; inf where the exact answer does not exist, 0 below what the oracle resolves."""
    if exact is None or not bool(value.isfinite().all()):
        return math.inf
    size = mpmath.norm(exact)
    error = float(mpmath.norm(mp(value) - exact) / size) if size else (0.0 if not value.any() else math.inf)
    return error if error > 1e-25 else 0.0


@lru_cache(4096)  # the functions of symmetric matrices are tried on the same ones
def eigen(a: Entries) -> tuple[mpmath.matrix, mpmath.matrix]:
    """Eigenvalues and eigenvectors of a symmetric matrix, in 60 digits."""
    return mpmath.eigsy(mpmath.matrix(a))


def oracle(name: str, a: Tensor, damping: float = 0.0, **options) -> mpmath.matrix | None:
    """A registered function of a + damping·I in 60 digits, by its row's `exact`; None where it does not exist."""
    function = REGISTRY[name]
    if not function.symmetric:
        x = mp(a) + mpmath.mpf(damping) * mpmath.eye(a.shape[0]) if damping else mp(a)
        return function.exact(mpmath, x, **options)
    w, v = eigen(entries(a))
    w = [e + mpmath.mpf(damping) for e in w]
    top = max(abs(e) for e in w)
    exists = True
    if function.domain == "definite":
        exists = min(w) > top * mpmath.mpf(10) ** -45
    elif function.domain == "semidefinite":
        exists = min(w) >= -10 * a.shape[0] * torch.finfo(a.dtype).eps * top
        w = [max(e, mpmath.mpf(0)) for e in w]
    values = [function.exact(mpmath, e, **options) for e in w] if exists else [None]
    return None if None in values else v * mpmath.diag(values) * v.T


def overflows(name: str, a: Tensor) -> bool:
    """Whether the exact value of a function in `EVERY` has an entry that its dtype does not hold."""
    exact = EVERY[name][1](a)
    return exact is not None and max(abs(e) for e in exact) > torch.finfo(a.dtype).max


def _as_matrix(value: Tensor, a: Tensor) -> Tensor:
    """A vector for each matrix as a column."""
    return value[..., None] if value.ndim < a.ndim else value


def _case(name: str, options: Options, needs: str) -> tuple:
    """The row of `FUNCTIONS` for a registered function with the options of one of its examples."""
    function = REGISTRY[name]

    def certified(a: Tensor) -> tuple[Tensor, gl.Certificate]:
        value, certificate = getattr(gl, f"{name}_ex")(a, **options(a))
        return _as_matrix(value, a), certificate

    def exact(a: Tensor) -> mpmath.matrix | None:
        return oracle(name, a, **options(a))

    def lapack(a: Tensor) -> Tensor:
        return _as_matrix(function.plain(a, **options(a)), a)

    return certified, exact, lapack, needs


NEEDS = {"semidefinite": "psd", "definite": "psd"}
EVERY = {
    label: _case(name, options, NEEDS.get(REGISTRY[name].domain, REGISTRY[name].domain))
    for label, name, options in examples()
} | {"inv_psd": _case("inv", lambda a: {}, "psd")}
"""name: (certified function, oracle, plain float64 LAPACK, the matrices it takes)."""

COSTLY = ("expm", "logm", "sign")
"""Functions whose oracles are slow: fewer matrices are scored, in test_linalg_of_matrices.py."""
FUNCTIONS = {name: case for name, case in EVERY.items() if name not in COSTLY}

oracle_svdvals = FUNCTIONS["svdvals"][1]


@lru_cache(4096)
def exact_svdvals(a: Entries) -> list[mpmath.mpf]:
    """Ascending."""
    return sorted(oracle_svdvals(torch.tensor(a, dtype=torch.float64)))


def oracle_norm(a: Tensor) -> mpmath.matrix:
    return mpmath.matrix([[exact_svdvals(entries(a))[-1]]])


def oracle_cond(a: Tensor) -> mpmath.matrix | None:
    s = exact_svdvals(entries(a))
    return mpmath.matrix([[s[-1] / s[0]]]) if s[0] > s[-1] * mpmath.mpf(10) ** -22 else None


def _number(result: tuple[Tensor, gl.Certificate]) -> tuple[Tensor, gl.Certificate]:
    return result[0][..., None, None], result[1]


def _lapack_norm(a: Tensor) -> Tensor:
    return torch.linalg.svdvals(a)[:1, None]


def _lapack_cond(a: Tensor) -> Tensor:
    s = torch.linalg.svdvals(a)
    return (s[0] / s[-1])[None, None]


SPECTRAL = {
    "spectral_norm": (lambda a: _number(gl.spectral_norm_ex(a)), oracle_norm, _lapack_norm, "general"),
    "spectral_norm/lanczos": (
        lambda a: _number(gl.spectral_norm_ex(a, method="lanczos")),
        oracle_norm,
        _lapack_norm,
        "general",
    ),
    "cond": (lambda a: _number(gl.cond_ex(a)), oracle_cond, _lapack_cond, "general"),
    "cond/lanczos": (lambda a: _number(gl.cond_ex(a, method="lanczos")), oracle_cond, _lapack_cond, "general"),
}
"""The same for numbers; "/method" names a method that auto takes only for large matrices, and which may flag more."""
ALL = FUNCTIONS | SPECTRAL
SCORED = EVERY | SPECTRAL
"""Those that `score` takes."""


def lapack_error(name: str, a: Tensor, exact: mpmath.matrix | None) -> float:
    """The error of plain float64 LAPACK on one matrix, rounded to its dtype; inf where it fails."""
    if exact is None or not bool(a.isfinite().all()):
        return math.inf
    try:
        return mp_error(SCORED[name][2](a.to(torch.float64)).to(a.dtype), exact)
    except torch.linalg.LinAlgError:
        return math.inf


def score(name: str, seed: int, count: int, dtype: torch.dtype, rtol: float) -> tuple[list, list[float], int, int]:
    """Silent failures, ratios of bound to error where converged, answers flagged, and answers LAPACK gets to rtol."""
    function, oracle, _, needs = SCORED[name]
    shapes = [(3, 3), (6, 6), (8, 8), *([(7, 3), (3, 6)] if needs == "general" else [])]
    silent, ratios, flagged, met = [], [], 0, 0
    for i, (m, n) in enumerate(shapes):
        a = hostile_for(needs, seed + i, count, m, n, dtype)
        value, certificate = function(a)
        bounds, converged = certificate.error_bound.tolist(), certificate.converged.tolist()
        for j in range(count):
            exact = oracle(a[j]) if bool(a[j].isfinite().all()) else None
            error = mp_error(value[j], exact)
            if error > bounds[j] * (1 + 1e-12):
                silent.append((m, n, j, error, bounds[j]))
            if converged[j] and error > 0:
                ratios.append(bounds[j] / error)
            if lapack_error(name, a[j], exact) <= rtol:
                met += 1
                flagged += not converged[j]
    return silent, ratios, flagged, met


def score_lowrank(
    seed: int, count: int, shape: tuple[int, int], dtype: torch.dtype, rtol: float, *, method: str = "auto"
) -> tuple[list, list[float], int, int]:
    """As `score`, of svd_lowrank's excess over the optimum, with double-double singular values as the oracle."""
    m, n = shape
    silent, ratios, flagged, met = [], [], 0, 0
    a = hostile(seed, count, m, n, dtype, psd=False)
    for rank in sorted({1, min(m, n) // 8, min(m, n) // 2} - {0}):
        (u, s, v), certificate = gl.svd_lowrank_ex(a, rank, method=method)
        for j, x in enumerate(a.double()):
            bound, converged = float(certificate.error_bound[j]), bool(certificate.converged[j])
            if not bool(x.isfinite().all()):
                silent += [(m, n, j, math.inf, bound)] if converged else []
                continue
            size = x.norm()
            x = x / size
            sigma = torch.linalg.svdvals(x)
            optimum = sigma[rank:].norm()
            part = (u[j].double() * (s[j].double() / size)) @ v[j].double().mT
            # What float64 makes of it is known to about this.
            blur = 1e-15 * (m + n) * (1 + bool(optimum < 1e-6) * 10)
            error = float((x - part).norm() - optimum)
            if error > bound + blur:
                silent.append((m, n, j, error, bound))
            if converged and error > 100 * blur:
                ratios.append(bound / error)
            p, q, r = torch.linalg.svd(x, full_matrices=False)
            plain = (p[:, :rank].to(dtype).double() * (q[:rank] * size).to(dtype).double() / size) @ r[:rank].to(
                dtype
            ).double()
            if float((x - plain).norm() - optimum) <= rtol:
                met += 1
                flagged += not converged
    return silent, ratios, flagged, met


def score_large(
    name: str, seed: int, count: int, shape: tuple[int, int], dtype: torch.dtype, rtol: float
) -> tuple[list, list[float], int, int]:
    """As `score`, of a number of larger matrices, with double-double singular values as the oracle."""
    function, _, lapack, _ = SPECTRAL[name]
    a = hostile(seed, count, *shape, dtype, psd=False)
    value, certificate = function(a)
    s, reference = gl.svdvals_ex(a.double(), method="svd_double_double", rtol=math.inf)
    silent, ratios, flagged, met = [], [], 0, 0
    for j, x in enumerate(a):
        bound, converged = float(certificate.error_bound[j]), bool(certificate.converged[j])
        if not bool(x.isfinite().all()):
            silent += [(*shape, j, math.inf, bound)] if converged else []
            continue
        spread = float(reference.error_bound[j] * s[j].norm())
        first, last = float(s[j, 0]), float(s[j, -1])
        exact = first if name.startswith("spectral_norm") else first / last if last else math.inf
        known = spread / (first if name.startswith("spectral_norm") else max(last - spread, 0.0) or math.nan)
        if not known < 0.1 * rtol:
            continue
        error = abs(float(value[j]) / exact - 1) if math.isfinite(exact) else math.inf
        if error > bound * (1 + 1e-12) + known:
            silent.append((*shape, j, error, bound))
        if converged and error > 10 * known:
            ratios.append(bound / error)
        if abs(float(lapack(x.double()).to(dtype).double()) / exact - 1) <= rtol:
            met += 1
            flagged += not converged
    return silent, ratios, flagged, met
