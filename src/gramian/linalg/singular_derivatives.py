"""The derivatives of singular values, singular vectors and what is made of them, by first-order perturbation.

All sums are in float64, and every formula consists of operations that have derivatives themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gramian.linalg.engine.derivative import Arguments, Given, Rule, Tangents, Values, guarded, only, symmetric
from gramian.linalg.engine.singular_vectors import singular_vectors
from gramian.linalg.engine.transforms import pullback

SMALL = 512
"""Up to this side all singular vectors cost little more than the first."""

GAP = 1e-10
"""Singular values whose difference is below this times the largest count as equal."""


# ---- singular values -------------------------------------------------------------------------------------------------


def _of_singular_values(slopes: Callable[[Tensor, Tensor | None], Tensor]) -> Rule:
    """The rule of a function of singular values whose gradient, times the one given, is `slopes(σ, given)`.

    With no gradient given it returns the slopes themselves.
    """

    def vjp(arguments: Arguments, values: Values, given: Given) -> dict[str, Tensor]:
        u, s, v = singular_vectors(arguments["a"])
        return {"a": (u * slopes(s, only(given))[..., None, :]) @ v.mH}

    def jvp(arguments: Arguments, values: Values, tangents: Tangents) -> Given:
        u, s, v = singular_vectors(arguments["a"])
        da = tangents["a"]
        assert da is not None
        along = (u.conj() * (da.to(v.dtype) @ v)).sum(-2).real
        return (slopes(s, None) * along if values[0].ndim == along.ndim else (slopes(s, None) * along).sum(-1),)

    return Rule(vjp, jvp)


def _nth(s: Tensor, i: int) -> Tensor:
    """One at position i, zero elsewhere."""
    return torch.zeros_like(s).index_fill(-1, torch.tensor(i % max(s.shape[-1], 1), device=s.device), 1.0)


def _all_values(s: Tensor, given: Tensor | None) -> Tensor:
    return s * 0 + (1.0 if given is None else given)


def _largest(s: Tensor, given: Tensor | None) -> Tensor:
    unit = s * 0 + (_nth(s, 0) if s.shape[-1] else s)
    return unit if given is None else unit * given[..., None]


def _ratio(s: Tensor, given: Tensor | None) -> Tensor:
    if not s.shape[-1]:
        return s
    low = s[..., -1:]
    unit = _nth(s, 0) / low - _nth(s, -1) * (s[..., :1] / low) / low
    return unit if given is None else unit * given[..., None]


SINGULAR_VALUES = _of_singular_values(_all_values)
"""dσᵢ = Re uᵢᴴ dA vᵢ; at equal values a subgradient, that of LAPACK's vectors. Lewis & Sendov (2005), theorem 7.1."""


def _spectral_norm_vjp(arguments: Arguments, values: Values, given: Given) -> Mapping[str, Any]:
    from gramian.linalg.norm import leading_vectors  # whose function has this derivative

    a = arguments["a"]
    # With a graph the vectors must have derivatives too.
    if torch.is_grad_enabled() or min(a.shape[-2:]) <= SMALL:
        return _of_singular_values(_largest).vjp(arguments, values, given)
    u, v = leading_vectors(a)
    return {"a": (only(given)[..., None] * u)[..., :, None] * v.conj()[..., None, :]}


SPECTRAL_NORM = Rule(_spectral_norm_vjp, _of_singular_values(_largest).jvp)
CONDITION = _of_singular_values(_ratio)


# ---- singular vectors ------------------------------------------------------------------------------------------------


def _transposed(jvp: Callable[[Arguments, Values, Tangents], Given], *names: str) -> Rule:
    """The rule whose vjp is the transpose of a jvp, which is linear."""

    def vjp(arguments: Arguments, values: Values, given: Given) -> dict[str, Any]:
        present = [name for name in names if isinstance(arguments[name], Tensor)]
        zero = [torch.zeros_like(arguments[name], dtype=torch.float64) for name in present]
        out, pull = pullback(lambda *x: jvp(arguments, values, dict(zip(present, x, strict=True))), *zero)
        full = tuple(torch.zeros_like(o) if g is None else g.double() for g, o in zip(given, out, strict=True))
        return dict(zip(present, pull(full), strict=True))

    return Rule(vjp, jvp)


def _vectors_along(a: Tensor, e: Tensor, right: Tensor, needed: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """How the leading U, σ and V of A change along E; `right` (..., n, k) are the vectors V that fix their signs.

    Raises where two of the leading values are equal and the vectors of that matrix are `needed` (...).
    """
    k = right.shape[-1]
    u, s, v = singular_vectors(a)
    cosine = (v[..., :k] * right.double()).sum(-2).detach()
    leading = torch.nn.functional.pad(s, (0, 1)) if k == s.shape[-1] else s
    gaps = -leading[..., : k + 1].diff(dim=-1)
    ok = (gaps > GAP * s[..., :1]) & (cosine.abs() > 0.9)
    guarded(
        ok.all(-1) | ~s.isfinite().all(-1) | ~needed,
        f"{name}: two of the leading singular values, or the last and the next, are equal, or the last is zero: the "
        "factors have no derivative there. Use svdvals, polar or svd_shrink, or another rank.",
    )
    sign = torch.where(cosine < 0, -1.0, 1.0)[..., None, :]
    first_u, first_v, first = u[..., :k] * sign, v[..., :k] * sign, s[..., None, :k]
    inner = u.mT @ e @ v
    own = inner[..., :k] * sign
    across = inner[..., :k, :].mT * sign
    difference = first.square() - s[..., :, None].square()
    same = torch.eye(s.shape[-1], k, dtype=torch.bool, device=s.device) | (difference == 0)
    share = torch.where(same, 0.0, 1 / torch.where(same, 1.0, difference))
    du = u @ ((first * own + s[..., :, None] * across) * share)
    dv = v @ ((s[..., :, None] * own + first * across) * share)
    image, back = e @ first_v, e.mT @ first_u
    divisor = torch.where(first == 0, torch.inf, first)
    if a.shape[-2] > a.shape[-1]:
        du = du + (image - u @ (u.mT @ image)) / divisor
    if a.shape[-2] < a.shape[-1]:
        dv = dv + (back - v @ (v.mT @ back)) / divisor
    return du, (first_u * image).sum(-2), dv


def _lowrank_jvp(arguments: Arguments, values: Values, tangents: Tangents) -> Given:
    da = tangents["a"]
    assert da is not None
    needed = arguments.get("needed", _any(da))
    return _vectors_along(arguments["a"].double(), da.double(), values[2], needed, "svd_lowrank")


def _lowrank_vjp(arguments: Arguments, values: Values, given: Given) -> dict[str, Any]:
    vectors = [_any(g) for g in (given[0], given[2]) if g is not None]
    none = torch.zeros(values[1].shape[:-1], dtype=torch.bool, device=values[1].device)
    needed = {"needed": vectors[0] | vectors[-1] if vectors else none}
    return _transposed(_lowrank_jvp, "a").vjp({**arguments, **needed}, values, given)  # pyright: ignore[reportReturnType]


def _any(x: Tensor) -> Tensor:
    """For each matrix of a batch, whether it has an entry that is not zero."""
    return (x.detach() != 0).flatten(-2).any(-1)


LOWRANK = Rule(_lowrank_vjp, _lowrank_jvp)
"""First-order perturbation of the leading singular triples. Stewart & Sun, Matrix Perturbation Theory (1990), §V.4."""


def _pca_jvp(arguments: Arguments, values: Values, tangents: Tangents) -> Given:
    x, dx = arguments["x"].double(), tangents["x"]
    assert dx is not None
    dx = dx.double()
    rows, change = x - x.mean(-2, keepdim=True), dx - dx.mean(-2, keepdim=True)
    needed = torch.ones((), dtype=torch.bool, device=x.device)
    _, ds, dv = _vectors_along(rows, change, values[0].mT, needed, "pca")
    size = (values[1].double() * (x.shape[-2] - 1)).sqrt()
    return dv.mT, 2 * size * ds / (x.shape[-2] - 1), dx.mean(-2)


PCA = _transposed(_pca_jvp, "x")
"""The leading right singular vectors of the centered rows."""


def _of_spectrum_along(
    a: Tensor,
    triples: tuple[Tensor, Tensor, Tensor],
    value: Tensor,
    slope: Tensor,
    e: Tensor | None,
    inner: Tensor,
    along: Tensor | None = None,
) -> Tensor:
    """How U η(Σ) Vᵀ changes along E, of which `inner` is UᵀEV, and by `along` of η itself: divided differences of η.

    Higham, Functions of Matrices (2008), theorem 3.11, for the odd function η of [[0, A], [Aᵀ, 0]].
    """
    u, s, v = triples
    row, column = s[..., :, None], s[..., None, :]
    gap, total = row - column, row + column
    tie = gap.abs() <= GAP * s[..., None, :1]
    mean = (slope[..., :, None] + slope[..., None, :]) / 2
    even = torch.where(tie, mean, (value[..., :, None] - value[..., None, :]) / torch.where(tie, 1.0, gap))
    odd = torch.where(total > 0, (value[..., :, None] + value[..., None, :]) / torch.where(total > 0, total, 1.0), mean)
    core = even * symmetric(inner) + odd * (inner - inner.mT) / 2
    out = u @ (core if along is None else core + torch.diag_embed(along)) @ v.mT
    factor = torch.where(s > 0, value / torch.where(s > 0, s, 1.0), slope)[..., None, :]
    if e is not None and a.shape[-2] != a.shape[-1]:
        left, right = (e.double() @ v) * factor, u * factor
        if a.shape[-2] > a.shape[-1]:
            out = out + (left - u @ (u.mT @ left)) @ v.mT
        else:
            image = right.mT @ e.double()
            out = out + u @ (image - (image @ v) @ v.mT)
    return out


def of_spectrum(change: Callable[..., Tensor]) -> Rule:
    """U η(Σ) Vᵀ for the η(σ) = `change(σ, **options)` of the arguments besides `a`; at a corner of η a mean slope."""

    def jvp(arguments: Arguments, values: Values, tangents: Tangents) -> Given:
        a, e = arguments["a"].double(), tangents["a"]
        assert e is not None
        u, s, v = singular_vectors(a)
        options = {name: x for name, x in arguments.items() if name not in ("a", "spectrum")}
        value, pull = pullback(lambda x: change(x, **options), s)
        (slope,) = pull(torch.ones_like(s))
        guarded(
            (s > 0) | (value == 0) | ~s.isfinite(),
            "prox: no derivative where a singular value is zero and becomes another, since any direction will do.",
        )
        return (_of_spectrum_along(a, (u, s, v), value, slope, e, u.mT @ e.double() @ v),)

    return _transposed(jvp, "a")


def shrinkage(
    shrink: Callable[[Tensor, Tensor, int, float, str], Tensor], estimated: Callable[[Tensor, int, float], Tensor]
) -> Rule:
    """U η(Σ) Vᵀ for an η that is homogeneous in σ and the noise level: divided differences of η, finite at ties.

    Source: Higham, Functions of Matrices (2008), theorem 3.11, for the odd function η of [[0, A], [Aᵀ, 0]].
    """

    def jvp(arguments: Arguments, values: Values, tangents: Tangents) -> Given:
        a, e = arguments["a"].double(), tangents.get("a")
        u, s, v = singular_vectors(a)
        k, n = sorted(a.shape[-2:])
        beta = k / n if n else 1.0
        given = arguments["noise"]
        noise = estimated(s, n, beta) if given is None else torch.zeros_like(s.sum(-1)) + given

        def eta(x: Tensor) -> Tensor:
            return shrink(x, noise, n, beta, arguments["loss"])

        value, pull = pullback(eta, s)
        (slope,) = pull(torch.ones_like(s))
        inner = torch.zeros_like(u.mT @ a @ v) if e is None else u.mT @ e.double() @ v
        # η(cσ, c·level) = c η(σ, level) gives the slope along the level.
        moved = tangents.get("noise")
        if given is None and k:
            at = s.argsort(-1).narrow(-1, (k - 1) // 2, 1)
            middle = s.gather(-1, at)[..., 0]
            guarded(
                (middle > GAP * s[..., 0]) | ~middle.isfinite(),
                "svd_shrink: no derivative where the estimated noise is zero, since it is the size of a singular value "
                "there. Pass noise=.",
            )
            moved = inner.diagonal(dim1=-2, dim2=-1).gather(-1, at)[..., 0] * noise / middle
        # Without noise η is the identity, and its slope along the level is zero.
        share = torch.where(noise > 0, 1 / torch.where(noise > 0, noise, 1.0), 0.0)
        along = torch.zeros_like(s) if moved is None else (value - s * slope) * (moved.double() * share)[..., None]
        return (_of_spectrum_along(a, (u, s, v), value, slope, e, inner, along),)

    return _transposed(jvp, "a", "noise")
