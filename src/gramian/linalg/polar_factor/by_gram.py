"""The polar factor through the Gram matrix, A (AᵀA)^(-1/2), with a bound that no condition number enters."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg.engine import lapack
from gramian.linalg.engine.backward_error import Rows, backward_error, tightened
from gramian.linalg.engine.double_double import eye_like, minus, pair, product, transpose
from gramian.linalg.engine.eigenvalue_ratio import hopeless
from gramian.linalg.engine.escalation import SMALL, Answer
from gramian.linalg.engine.probes import EXACT, MORE, Probes, apply, apply_transposed, closer, probes, twice
from gramian.linalg.engine.rounding import U, chain_rounding, gamma, norm
from gramian.linalg.engine.spectrum import Spectrum
from gramian.linalg.engine.symmetric_products import gram, symmetric_product

GRAM32_ERROR = 2.0**-24
"""What a float32 Gram matrix and its eigendecomposition lose, as relative error over κ² at least; observed."""

NEAR = 3.0
"""The factor by which a bound may miss what was asked for more probes to be tried: they make it about so much less.
Where the error that is to be expected is so near that they will not do, the few are not tried at all."""

EXPECTED, ABOVE = 0.25, 4.0
"""The relative error in units of εκ², as observed with logarithmically spaced singular values, and how far above the
error a bound by few probes may be."""

PRODUCT32_ERROR = (1.5e-6, 1.5e-7)
"""What the float32 product of A and the root adds to the bound: a constant, and one times κ; observed."""


def gram_eigh32(x: Tensor, *, rtol: float, certify: bool = True) -> Answer | None:
    """By an eigendecomposition of the Gram matrix, all in float32; error εκ²."""
    g = gram(x)
    if hopeless(g, rtol, GRAM32_ERROR):
        return None
    w, v, ok = lapack.eigh(g)
    return _from_eigenpairs(x, w, v, ok, 2.0**-23, rtol, certify)


def gram_eigh64(x: Tensor, *, rtol: float, certify: bool = True, dtype: torch.dtype = torch.float64) -> Answer:
    """By a Gram matrix and an eigendecomposition in float64; error uκ². A is applied in float32 if κ and A allow."""
    wide = x.double()  # once, where it is used again
    w, v, ok = lapack.eigh(gram(wide))
    if x.dtype == torch.float32:
        kappa = (w[..., -1:] / w[..., :1].clamp_min(2.0**-1000)).sqrt()
        costly = PRODUCT32_ERROR[0] + PRODUCT32_ERROR[1] * kappa > min(rtol, 2e-4)
        x, v = (wide, v) if w.shape[-1] <= SMALL or bool(costly.any()) else (x, v.float())
    return _from_eigenpairs(x, w, v, ok, 2 * U, rtol, certify, dtype)


def _from_eigenpairs(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    ok: Tensor,
    eps: float,
    rtol: float,
    certify: bool,
    dtype: torch.dtype = torch.float64,
) -> Answer:
    """A Z with Z = V w^(-1/2) Vᵀ, certified."""
    n = x.shape[-1]
    top = w.abs().amax(-1, keepdim=True) if n else w.new_zeros(w.shape[0], 1)
    # Below this the Gram matrix cannot tell a small singular value from zero: another method has to.
    kept = w > 4 * math.sqrt(max(1, n)) * eps * top
    root = torch.where(kept, w, torch.inf).rsqrt().double()
    half = root.sqrt().to(v.dtype)
    left = v * half[:, None, :]
    q = x @ symmetric_product(left, left.mT)
    spectrum = Spectrum(w.double().clamp_min(0).sqrt(), v)
    seen = kept.all(-1)
    if not certify:
        return Answer.bare(q, torch.where(ok & seen, cert.NONE, cert.INACCURATE), spectrum=spectrum)
    reason = torch.where(ok, torch.where(seen, cert.NONE, cert.INACCURATE), cert.LAPACK)
    if n <= EXACT and x.dtype == left.dtype == torch.float64:
        answer = _small(x, q, left, root, w, ok & seen, dtype)
    else:
        if eps == 2 * U and q.dtype == torch.float32 and n > EXACT and math.isfinite(rtol):
            answer = _by_backward_error(x, q, v, root, w, ok & seen)
            if bool((answer.error <= 0.9 * rtol * math.sqrt(n)).all()):
                return replace(answer, spectrum=spectrum)
        expected = EXPECTED * eps * top / w.clamp_min(eps * top)
        narrow = bool(((expected > rtol / ABOVE) & (expected < rtol)).any(-1).any()) if n > EXACT else False
        answer = _certified(x, q, v, root, w, ok & seen, rtol, few=not narrow)
    return replace(answer, reason=torch.where(ok & seen, answer.reason, reason), spectrum=spectrum)


def _by_backward_error(x: Tensor, q: Tensor, v: Tensor, root: Tensor, w: Tensor, ok: Tensor) -> Answer:
    """The answer Q with the bound of `gram_bound` for Z = V₀ w^(-1/2) V₀ᵀ, V₀ = V(VᵀV)^(-1/2), in float64.

    F = Z(AᵀA − V₀wV₀ᵀ)Z is bounded by the rounding of the Gram matrix and LAPACK's bounds on that of the
    eigendecomposition and on φ = ‖VᵀV − I‖₂. It has κ in it: where that makes it
    more than what is measured, Q − AZ, there is no bound.
    """
    n, size, p = x.shape[-1], w.clamp_min(0).sum(-1) * 1.01, probes(x.shape[-1], x.device)
    omega = p.omega.expand(x.shape[0], -1, -1)
    length = norm(p.omega[None])
    vectors = v.double()
    z = apply(vectors, root[:, :, None] * apply_transposed(vectors, omega))
    blur = chain_rounding(n + 3, size.sqrt()) * (norm(z) + 2 * math.sqrt(n) * root[:, 0] * length)
    blur = blur + chain_rounding(n, 2 * math.sqrt(n), length)
    apart = closer(apply(q, omega) - apply(x, z), p, blur) + 2.0**-100 * (1 + root[:, 0]) * n
    known, f = _known(x, w, size)
    error = (known + apart) * (1 + 2.0**-20)
    proven = ok & (f < 0.1) & (known <= apart) & error.isfinite()
    reason = torch.where(proven, cert.NONE, cert.INACCURATE)
    exact = torch.full_like(error, math.sqrt(n))
    return Answer(q, torch.where(proven, error, math.inf), f, reason, failure=6 * p.failure, size=exact)


def _known(x: Tensor, w: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The bound of `gram_bound` for the exact AZ by LAPACK's backward error, and that of ‖F‖_F, if it is below 0.1."""
    m, n = x.shape[-2:]
    top, low, phi = w[:, -1], w[:, 0].clamp_min(2.0**-1000), backward_error(n)
    f = math.sqrt(n) * (gamma(m) * size + phi * top) / low
    return f + 1.2 * math.sqrt(n) * phi * (1 + (top / low).sqrt()), f


def _small(x: Tensor, q: Tensor, left: Tensor, root: Tensor, w: Tensor, ok: Tensor, dtype: torch.dtype) -> Answer:
    """The answer for small matrices, in float64 throughout: bounded by LAPACK's backward error, or by its residuals."""
    n, size = x.shape[-1], w.clamp_min(0).sum(-1) * 1.01
    if not x[0:1].numel():
        return _exactly_certified(x, q, left, ok)

    def rough() -> tuple[Tensor, Tensor]:
        known, f = _known(x, w, size)
        # Z is LLᵀ, a rounding or two off for each entry of L, and Q is AZ.
        apart = size.sqrt() * (1.2 * gamma(n + 8) * root.sum(-1) + 1.1 * gamma(n) * norm(root[:, None]))
        return torch.where(ok & (f < 0.1), (known + apart) * (1 + 2.0**-20), math.inf), f

    def finer(rows: Rows) -> tuple[Tensor, Tensor]:
        found = _exactly_certified(x[rows], q[rows], left[rows], ok[rows])
        return found.error, found.residual

    error, residual = tightened(rough, finer, norm(q), dtype)
    reason = torch.where(error.isfinite(), cert.NONE, cert.INACCURATE)
    return Answer(q, error, residual, reason, size=torch.full_like(error, math.sqrt(n)))


def _certified(
    x: Tensor, q: Tensor, v: Tensor, root: Tensor, w: Tensor, ok: Tensor, rtol: float, *, few: bool
) -> Answer:
    """The answer Q with its bound where it is `ok`, by more probes where that by a `few` would miss `rtol` or does."""
    n = x.shape[-1]
    # trace(AᵀA) = ‖A‖²_F, up to a rounding for which the constants of `gram_bound` leave room.
    size = w.double().clamp_min(0).sum(-1).sqrt() * 1.01
    p = probes(n, x.device) if few else probes(n, x.device, MORE)
    error, defect = gram_bound(x, q, v, root, size, p)
    if few and math.isfinite(rtol) and n > EXACT:
        near = (error > rtol * math.sqrt(n)) & (error < NEAR * rtol * math.sqrt(n))
        if bool(near.any()):
            error, defect = gram_bound(x, q, v, root, size, probes(n, x.device, MORE))
    error = torch.where(ok, error, math.inf)
    reason = torch.where(error.isfinite(), cert.NONE, cert.INACCURATE)
    exact = torch.full_like(error, math.sqrt(n))
    return Answer(q, error, defect, reason, failure=6 * p.failure, size=exact)


def _exactly_certified(x: Tensor, q: Tensor, left: Tensor, ok: Tensor) -> Answer:
    """The bound of `gram_bound` for Z = LLᵀ with the L that was rounded, which is semidefinite too.

    Its residuals are in double-double arithmetic, which costs little here. In float64 they are rounding, and the bound
    would be a hundred times the error.
    """
    factor = pair(left)
    image = product(product(pair(x), factor), transpose(factor))
    away, away_error = minus(image, pair(q))
    f, f_error = minus(product(transpose(image), image), eye_like(x))
    apart, defect = norm(away) + away_error, norm(f) + f_error
    error = (defect / math.sqrt(2) * (1 + defect).sqrt() / (1 - defect) + apart) * (1 + 2.0**-20)
    error = torch.where(ok & (defect < 0.5) & error.isfinite(), error, math.inf)
    if not x[0:1].numel():
        error = torch.zeros_like(error)
    reason = torch.where(error.isfinite(), cert.NONE, cert.INACCURATE)
    return Answer(q, error, defect, reason, size=torch.full_like(error, math.sqrt(x.shape[-1])))


def gram_bound(x: Tensor, q: Tensor, v: Tensor, root: Tensor, size: Tensor, p: Probes) -> tuple[Tensor, Tensor]:
    """A bound on ‖Q − polar(A)‖_F where Q ≈ A Z, Z = V diag(root) Vᵀ and ‖A‖_F ≤ size, and on ‖(AZ)ᵀAZ − I‖_F.

    Let F = ZAᵀAZ − I, ‖F‖₂ ≤ f < 1 and H = Z⁻¹. Then AᵀA = H(I + F)H, and along M(t) = H(I + tF)H the root D = M(t)^½
    moves by DD' + D'D = HFH = D F̃ D, ‖F̃‖_F ≤ ‖F‖_F / (1 − tf); so D'D⁻¹ has the entries dᵢ F̃ᵢⱼ / (dᵢ + dⱼ), and
    ‖AZ − polar(A)‖_F = ‖D(1)H⁻¹ − I‖_F ≤ ‖F‖_F √(1 + f) / (√2 (1 − f)): whatever the condition of A. Z is positive
    definite by construction, and A of full rank because f < 1. What remains is Q − AZ, which is measured.
    """
    n = x.shape[-1]
    if not x[0:1].numel():
        zero = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        return zero, zero
    omega = p.omega.expand(x.shape[0], -1, -1)
    length = norm(omega)

    vectors = v.double()  # once for all products

    def turn(y: Tensor) -> Tensor:
        return apply(vectors, root[:, :, None] * apply_transposed(vectors, y))

    z = turn(omega)
    image = apply(q, omega)
    peak = root.amax(-1)
    turned = 2 * math.sqrt(n) * peak * length
    blur = chain_rounding(n + 3, size) * (norm(z) + turned)
    back, forth, _ = twice(x, z.mT)
    y = forth.mT
    apart = closer(image - y, p, blur + chain_rounding(n, 2 * math.sqrt(n), length))
    apart = apart + 2.0**-100 * (1 + peak) * n  # entries that float32 made subnormal
    # (AZ)ᵀAZΩ itself, whose rounding κ magnifies; it holds as long as f < 1/2, so that ‖ZAᵀ‖₂ < 1.3.
    near = 1.3 * blur + 1.1 * peak * chain_rounding(sum(x.shape[-2:]) + 3, size, 1 + 2 * math.sqrt(n)) * norm(y)
    if bool((near * p.factor < apart).all()):
        f = closer(turn(back.mT) - omega, p, near)
    else:
        blur = chain_rounding(sum(x.shape[-2:]), 6 * math.sqrt(n), length)
        own = closer(apply_transposed(q, image) - omega, p, blur)
        # From QᵀQ to (AZ)ᵀAZ.
        f = own + 2 * (1 + own).sqrt() * apart + apart**2
    error = f / math.sqrt(2) * (1 + f).sqrt() / (1 - f) + apart
    return torch.where((f < 0.5) & error.isfinite(), error, math.inf), f
