"""The derivatives of inverses, roots, polar factors and products, by implicit formulas on the value that was computed.

Those of singular values and vectors are in `singular_derivatives.py`.

Sums are in float64, or in the dtype of the eigenvectors that the value came with. Every formula consists of operations
that have derivatives themselves, so that a second derivative is the derivative of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gramian.linalg.engine.derivative import Arguments, Given, Rule, Tangents, Values, guarded, only, symmetric
from gramian.linalg.engine.spectrum import known
from gramian.linalg.engine.stable import solved
from gramian.linalg.engine.sylvester import solve_power_sum, solve_skew
from gramian.linalg.engine.transforms import grads_batched, pullback


def _with_damping(to_m: Tensor, arguments: Arguments) -> dict[str, Tensor]:
    """Gradients of M and of the damping λ, from that of M + λI."""
    damping = arguments["damping"]
    trace = to_m.diagonal(dim1=-2, dim2=-1).sum(-1)
    return {"m": to_m, "damping": trace.sum_to_size(damping.shape) if isinstance(damping, Tensor) else trace}


def _step(tangents: Tangents, like: Tensor) -> Tensor:
    """The tangent of M + λI."""
    m = tangents.get("m")
    step = torch.zeros_like(like, dtype=torch.float64) if m is None else m.double()
    shift = tangents.get("damping")
    if shift is not None:
        eye = torch.eye(like.shape[-1], dtype=torch.float64, device=like.device)
        step = step + shift.double()[..., None, None] * eye
    return step


# ---- inverses --------------------------------------------------------------------------------------------------------


def _inverse_vjp(arguments: Arguments, values: Values, given: Given) -> dict[str, Tensor]:
    y = values[0].double()
    return _with_damping(-(y.mT @ only(given) @ y.mT), arguments)


def _inverse_jvp(arguments: Arguments, values: Values, tangents: Tangents) -> Given:
    y = values[0].double()
    return (-(y @ _step(tangents, y) @ y),)


INVERSE = Rule(_inverse_vjp, _inverse_jvp)
"""dY = −Y dM Y. Higham, Functions of Matrices (2008), §3.1."""


def _solved(arguments: Arguments, m: Tensor, right: Tensor) -> Tensor:
    from gramian.linalg.linear_system import solve_ex  # whose derivative this is

    if grads_batched(right):
        shifted = m.double() + _step(
            {"damping": torch.as_tensor(arguments["damping"], dtype=torch.float64, device=m.device)}, m
        )
        return torch.linalg.solve_ex(shifted, right)[0]
    return solve_ex(m.double(), right, arguments["damping"])[0]


def _solution_vjp(arguments: Arguments, values: Values, given: Given) -> dict[str, Tensor]:
    to_b = _solved(arguments, arguments["m"].mT, only(given))
    return {"b": to_b, **_with_damping(-(to_b @ values[0].double().mT), arguments)}


def _solution_jvp(arguments: Arguments, values: Values, tangents: Tangents) -> Given:
    z, b = values[0].double(), tangents.get("b")
    right = -(_step(tangents, arguments["m"]) @ z)
    return (_solved(arguments, arguments["m"], right if b is None else right + b.double()),)


SOLUTION = Rule(_solution_vjp, _solution_jvp)
"""dZ = M⁻¹(dB − dM Z). Giles, Collected Matrix Derivative Results (2008), §2.3.1."""


# ---- roots -----------------------------------------------------------------------------------------------------------


def _of_roots(along: Callable[[Arguments, Tensor, Tensor], Tensor]) -> Rule:
    """The rule of a root X of a symmetric matrix, whose derivative `along` a symmetric matrix is its own adjoint."""

    def vjp(arguments: Arguments, values: Values, given: Given) -> dict[str, Tensor]:
        x, e = _worked(arguments, values[0], given[0])
        return _with_damping(along(arguments, x, symmetric(e)), arguments)

    def jvp(arguments: Arguments, values: Values, tangents: Tangents) -> Given:
        x, e = _worked(arguments, values[0], _step(tangents, values[0]))
        return (along(arguments, x, symmetric(e)),)

    return Rule(vjp, jvp)


def _worked(arguments: Arguments, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors in the dtype of the spectrum's vectors, or in float64 if there is none."""
    spectrum = arguments.get("spectrum")
    work = torch.float64 if spectrum is None else spectrum.vectors.dtype
    return [x.to(work) for x in tensors if x is not None]


def _along_inverse_root(arguments: Arguments, x: Tensor, e: Tensor) -> Tensor:
    p, spectrum = arguments["p"], arguments.get("spectrum")
    # Powers of X need entries near 1: with X = 2ᵏ X̂ the answer is 2^(k(p + 1)) times that of X̂.
    alone = False
    if known(spectrum) and x.numel():
        # Then the eigenvalues do, and nothing else sees what is made here.
        alone = True
        exponent = torch.frexp(spectrum.values.amax(-1))[1].double()
    else:
        x, exponent = _normalized(x, torch.zeros(x.shape[:-2], dtype=torch.float64, device=x.device))
    if spectrum is not None:
        spectrum = spectrum._replace(values=spectrum.values * torch.exp2(-exponent)[..., None])
    d = solve_power_sum(x, e, p, "inv_root", inverse=True, symmetric=True, spectrum=spectrum)
    half = (exponent * (p + 1) / 2).floor()
    for part in (half, exponent * (p + 1) - half):
        factor = torch.exp2(part).to(d.dtype)[..., None, None]
        d = d.mul_(factor) if alone else d * factor
    return d


INVERSE_ROOT = _of_roots(_along_inverse_root)
"""Σₖ Xᵏ dX Xᵖ⁻¹⁻ᵏ = −Xᵖ dM Xᵖ, the derivative of XᵖM = I."""

SQUARE_ROOT = _of_roots(
    lambda arguments, x, e: solve_power_sum(
        x, e, 2, "sqrtm", root=True, symmetric=True, spectrum=arguments.get("spectrum")
    )
)
"""X dX + dX X = dM. Higham, Functions of Matrices (2008), §6.1."""


# ---- functions of matrices that need not be symmetric ----------------------------------------------------------------


def _sign_vjp(arguments: Arguments, values: Values, given: Given) -> dict[str, Tensor]:
    s = values[0].double()
    z = solved((arguments["m"].double() @ s).mT, only(given))
    return {"m": z - s.mT @ z @ s.mT}


def _sign_jvp(arguments: Arguments, values: Values, tangents: Tangents) -> Given:
    s, m = values[0].double(), tangents["m"]
    assert m is not None
    e = m.double()
    return (solved(arguments["m"].double() @ s, e - s @ e @ s),)


SIGN = Rule(_sign_vjp, _sign_jvp)
"""N dS + dS N = dM − S dM S, N = MS. Higham, Functions of Matrices (2008), theorem 5.3."""


PRINCIPAL_ROOT = Rule(
    lambda arguments, values, given: _with_damping(solved(values[0].double().mT, only(given)), arguments),
    lambda arguments, values, tangents: (solved(values[0].double(), _step(tangents, values[0])),),
)
"""X dX + dX X = dM, as for symmetric matrices."""


# ---- the polar factor ------------------------------------------------------------------------------------------------


def _polar_along(arguments: Arguments, values: Values, e: Tensor | None) -> Tensor:
    """The derivative along E; the map from E to it is its own adjoint."""
    assert e is not None
    a = arguments["a"]
    wide, tall = a.shape[-2] < a.shape[-1], a.shape[-2] != a.shape[-1]
    a, u, e = (x.mT if wide else x for x in _worked(arguments, a, values[0], e))
    spectrum = arguments.get("spectrum")
    if known(spectrum):
        # With the singular vectors the products are fewer.
        sigma, right = spectrum.values, spectrum.vectors
        left, image = u @ right, e @ right
        inner = left.mT @ image
        core = solve_skew(inner, sigma, "polar", outside=image if tall else None)
        if tall:
            share = torch.where(sigma > 0, 1 / sigma, 0.0).to(right.dtype)[..., None, :]
            out = (left @ (core - inner * share) + image * share) @ right.mT
        else:
            out = left @ core @ right.mT
        return out.mT if wide else out
    inner = u.mT @ e
    h = symmetric(u.mT @ a)
    out = u @ solve_power_sum(h, inner - inner.mT, 2, "polar", spectrum=spectrum)
    if tall:
        outside, h = (e - u @ inner).double(), h.double()
        zero = (h.detach() == 0).flatten(-2).all(-1)
        guarded(
            ~(zero & (outside.detach() != 0).flatten(-2).any(-1)),
            "polar: has no derivative at a zero matrix. Leave such matrices out of the loss.",
        )
        eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
        safe = torch.where(zero[..., None, None], eye, h)  # where nothing is asked, not NaN
        out = out + torch.linalg.solve_ex(safe, outside, left=False)[0]
    return out.mT if wide else out


POLAR = Rule(
    lambda arguments, values, given: {"a": _polar_along(arguments, values, given[0])},
    lambda arguments, values, tangents: (_polar_along(arguments, values, tangents["a"]),),
)
"""dU = UΩ + (I − UUᵀ) dA H⁻¹ with H = UᵀA and HΩ + ΩH = UᵀdA − dAᵀU. Kenney & Laub, SIAM J. Matrix Anal. 12 (1991)."""


ROOTS = 8
"""Square roots that bring the matrices of a logarithm near to the identity, for its derivative."""

# ---- what a differentiable formula computes again --------------------------------------------------------------------


def recomputed(formula: Callable[[Arguments], Values], name: str) -> Rule:
    """The rule of a function whose value `formula` computes too, by differentiable operations, from one argument."""

    def vjp(arguments: Arguments, values: Values, given: Given) -> dict[str, Any]:
        out, pull = pullback(lambda x: formula({**arguments, name: x}), _double(arguments[name]))
        full = tuple(torch.zeros_like(o) if g is None else g.double() for g, o in zip(given, out, strict=True))
        return {name: pull(full)[0]}

    def jvp(arguments: Arguments, values: Values, tangents: Mapping[str, Any]) -> Given:
        # The transpose of the vjp, which is linear: forward mode does not nest.
        zero = tuple(torch.zeros_like(v, dtype=torch.float64) for v in values)
        _, push = pullback(lambda *given: vjp(arguments, values, given)[name], *zero)
        return push(_filled(tangents[name], arguments[name]))

    return Rule(vjp, jvp)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else tuple(y.double() for y in x)


def _filled(tangent: Any, like: Any) -> Any:
    """The tangents in float64, zero where there is none."""
    if isinstance(like, Tensor):
        return torch.zeros_like(like, dtype=torch.float64) if tangent is None else tangent.double()
    return tuple(_filled(t, x) for t, x in zip(tangent, like, strict=True))


def _normalized(x: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """X over a power of two, which joins the exponent; a constant, as far as derivatives go."""
    if not x.shape[-2] or not x.shape[-1]:
        return x, exponent
    peak = x.detach().abs().amax((-2, -1))
    e = torch.where(peak > 0, torch.frexp(peak)[1], 0)
    return x * torch.exp2(-e.double()).to(x.dtype)[..., None, None], exponent + e


def _as_slogdet(x: Tensor, exponent: Tensor) -> Values:
    size = torch.linalg.matrix_norm(x)
    return x / size[..., None, None], size.log() + exponent * math.log(2)


def _power(arguments: Arguments) -> Values:
    a, k = arguments["a"], arguments["k"]
    if not k:
        a = a * 0 + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    x, exponent = _normalized(a, torch.zeros(a.shape[:-2], dtype=torch.float64, device=a.device))
    if k < 0:
        x, exponent = _normalized(torch.linalg.inv_ex(x)[0], -exponent)
    first, count, start = x, exponent, exponent
    for bit in bin(abs(k))[3:]:
        x, count = _normalized(x @ x, 2 * count)
        if bit == "1":
            x, count = _normalized(x @ first, count + start)
    return _as_slogdet(x, count)


def _product(arguments: Arguments) -> Values:
    first, *rest = arguments["matrices"]
    x, exponent = _normalized(first, torch.zeros(first.shape[:-2], dtype=torch.float64, device=first.device))
    for a in rest:
        a, own = _normalized(a, torch.zeros_like(exponent))
        x, exponent = _normalized(x @ a, exponent + own)
    return _as_slogdet(x, exponent)


POWER = recomputed(_power, "a")
PRODUCT = recomputed(_product, "matrices")

EXPONENTIAL = recomputed(lambda arguments: (torch.linalg.matrix_exp(arguments["m"]),), "m")
"""The Fréchet derivative, the upper right block of the exponential of [[Mᵀ, E], [0, Mᵀ]]. Higham (2008), §10.6."""


def _logarithm(arguments: Arguments) -> Values:
    """By square roots and a Padé approximant, as the value, in operations with derivatives."""
    from gramian.linalg.logarithm import gauss_legendre  # whose derivative this is
    from gramian.linalg.principal_root import plain_root

    x = arguments["m"]
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(ROOTS):
        x = plain_root(x)
    y = x - eye
    total = sum(weight * torch.linalg.inv_ex(eye + node * y)[0] for node, weight in gauss_legendre(12))
    return (2.0**ROOTS * (y @ total),)


LOGARITHM = recomputed(_logarithm, "m")
"""d log A = 2ᵏ d log(A^(1/2ᵏ)), where the roots have the derivatives of roots. Higham (2008), §11.8."""
