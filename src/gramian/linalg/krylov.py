"""Block Lanczos with full reorthogonalisation, and what it proves about the extreme eigenvalues.

The work is float64; a map may compute in its own dtype, and then its rounding is the caller's to add.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg.twofold import U

Apply = Callable[[Tensor], Tensor]

FAILURE = 1e-10
"""The probability with which the estimates here may fail, one in 10¹⁰ for each matrix."""


class Krylov(NamedTuple):
    """M W = W T + F E_qᵀ: an orthonormal basis W (B, n, p), T (B, p, p) = WᵀMW, and the residual block F (B, n, r)."""

    basis: Tensor
    t: Tensor
    residual: Tensor
    block: int


def default_generator(generator: torch.Generator | None) -> torch.Generator:
    """The caller's generator, or a fresh one of seed 0: never torch's global one, and the same answer every time."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def gaussian(generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    """Standard normal float64 entries, drawn on the generator's device, on that of `like`."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).to(like.device)


def times(a: Tensor, y: Tensor) -> Tensor:
    """A Y of a (B, m, n) and few columns y (B, n, r), in a's dtype, returned in float64.

    As (YᵀAᵀ)ᵀ, since BLAS takes up to ten times as long with a thin right factor, and without a batch where there is
    one matrix, since a batched product goes another way.
    """
    y = y.to(a.dtype)
    if a.shape[0] == 1:
        one = torch.mv(a[0], y[0, :, 0])[:, None] if y.shape[-1] == 1 else (y[0].mT @ a[0].mT).mT
        return one[None].to(torch.float64)
    return (y.mT @ a.mT).mT.to(torch.float64)


def orthonormal(x: Tensor, against: Tensor | None = None) -> Tensor:
    """Orthonormal columns that span x (B, n, r), which is orthogonal to `against`; one that vanishes becomes zero.

    A last projection takes away what normalising a small column magnified of its rounding.
    """
    start = x.norm(dim=-2, keepdim=True)
    if x.shape[-1] == 1:
        q, size = x / start.clamp_min(2.0**-500), start
    else:
        q, r = torch.linalg.qr(x)
        size = r.diagonal(dim1=-2, dim2=-1).abs()[..., None, :]
    kept = (size > 1e-13 * start.amax(-1, keepdim=True)) & (start > 2.0**-500)
    if against is not None:
        q = q - times(against, times(against.mT, q))
        q = q / q.norm(dim=-2, keepdim=True).clamp_min(2.0**-500)
    return torch.where(kept, q, 0.0)


def lanczos(
    apply: Apply, start: Tensor, steps: int, *, stop: Callable[[Krylov], bool] | None = None, every: int = 4
) -> Krylov:
    """Block Lanczos of a symmetric operator, from the block `start` (B, n, r), fully reorthogonalised.

    W = [W₁ … W_q], M W_j = W_{j-1}B_{j-1}ᵀ + W_jA_j + W_{j+1}B_j; every new block is projected against all before it.
    Arguments: `apply`, X (B, n, r) → M X; `steps` q; `stop` is asked after `every` steps, and then an eighth of them.
    Cost: q products with r columns and 4nr²q² flops. Accuracy: WᵀW = I to rounding.
    Source: Golub and Underwood (1977); Golub and Van Loan, Matrix Computations (2013), §10.3.

    >>> m = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))[None]
    >>> found = lanczos(lambda x: m @ x, torch.ones(1, 3, 1, dtype=torch.float64), 3)
    >>> torch.linalg.eigvalsh(found.t).round(decimals=6).tolist()
    [[1.0, 2.0, 3.0]]
    """
    batch, n, r = start.shape
    steps = max(1, min(steps, -(-n // r)))
    # Rows, which the products below read in their order.
    rows = start.new_zeros(batch, steps * r, n)
    basis = rows.mT
    t = start.new_zeros(batch, steps * r, steps * r)
    block = orthonormal(start)
    found = Krylov(basis[:, :, :0], t[:, :0, :0], block, r)
    due = every
    for j in range(steps):
        here = slice(j * r, (j + 1) * r)
        rows[:, here] = block.mT
        known = basis[:, :, : (j + 1) * r]
        image = apply(block)
        column = times(known.mT, image)
        t[:, : (j + 1) * r, here] = column
        t[:, here, : (j + 1) * r] = column.mT
        # "Twice is enough" (Giraud et al., Numer. Math. 101, 2005).
        image = image - times(known, column)
        image = image - times(known, times(known.mT, image))
        found = Krylov(known, t[:, : (j + 1) * r, : (j + 1) * r], image, r)
        if j + 1 == steps:
            break
        if stop is not None and j + 1 == due:
            if stop(found):
                break
            due += max(every, due // 8)
        block = orthonormal(image, known)
    square = (found.t + found.t.mT) / 2
    return found._replace(t=square)


def overlap(n: int, r: int, failure: float = FAILURE) -> float:
    """A g with P(‖uᵀW₁‖ < g) ≤ failure, for a fixed unit u and the span W₁ of r Gaussian vectors in n dimensions.

    ‖uᵀW₁‖² is Beta(r/2, (n − r)/2), and P(Beta ≤ x) ≤ 1.5 x^(r/2) (n/2)^(r/2) / Γ(r/2 + 1) for x below 1/2.

    >>> overlap(1000, 1) < overlap(1000, 4) < 1
    True
    """
    if r >= n:
        return 1.0
    log_x = (math.log(failure / 1.5) + math.lgamma(r / 2 + 1)) * 2 / r - math.log(n / 2)
    return math.exp(min(log_x, math.log(0.5)) / 2)


def _transfer(w: Tensor, first: Tensor, last: Tensor, at: Tensor) -> Tensor:
    """‖E_qᵀ(λ − T)⁻¹E₁‖_F at λ (B,) above T's eigenvalues w, from its vectors' first and last rows."""
    gap = (at[:, None] - w).clamp_min(2.0**-900)
    return ((last / gap[:, None, :]) @ first.mT).flatten(1).norm(dim=1)


def top_within(found: Krylov, share: float, *, failure: float = FAILURE) -> Tensor:
    """Whether `top_bound` gives at most (1 + share) of the Ritz value, from one evaluation in place of sixty."""
    w, v = torch.linalg.eigh((found.t + found.t.mT) / 2)
    theta, r, n = w[:, -1].clamp_min(0), found.block, found.basis.shape[-2]
    reach = found.residual.flatten(1).norm(dim=1) * _transfer(w, v[:, :r], v[:, -r:], theta * (1 + share))
    return (reach < overlap(n, r, failure)) | (theta == 0)


def top_bound(found: Krylov, *, failure: float = FAILURE) -> tuple[Tensor, Tensor]:
    """The largest Ritz value θ and, with probability 1 − failure, an upper bound on the largest eigenvalue.

    For an eigenpair (λ, u), uᵀM W = λ uᵀW gives uᵀW₁ = uᵀF E_qᵀ(λ − T)⁻¹E₁; as ‖uᵀW₁‖ ≥ g but with small probability,
    λ > θ requires ‖F‖ ‖E_qᵀ(λ − T)⁻¹E₁‖ ≥ g, and the left side falls with λ. Bisection finds where.
    Source: van Dorsselaer, Hochstenbach, van der Vorst, SIAM J. Matrix Anal. Appl. 22 (2000), §3, here for blocks.
    """
    r, n = found.block, found.basis.shape[-2]
    w, v = torch.linalg.eigh(found.t)
    theta = w[:, -1]
    spread = w.abs().amax(-1)
    size = found.residual.flatten(1).norm(dim=1)
    g = overlap(n, r, failure)
    first, last = v[:, :r, :], v[:, -r:, :]
    if found.basis.shape[-1] >= n:
        return theta, theta + 8 * n * U * spread
    low, high = theta.clone(), theta + size * (1 + 1 / g) + spread * 1e-15
    for _ in range(60):
        middle = (low + high) / 2
        allowed = size * _transfer(w, first, last, middle) >= g
        low, high = torch.where(allowed, middle, low), torch.where(allowed, high, middle)
    return theta, high + 8 * n * U * spread
