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


def orthonormal(x: Tensor, against: Tensor | None = None) -> Tensor:
    """Orthonormal columns that span x (B, n, r) less `against`; a column that vanishes there becomes zero.

    Two rounds of projection: "twice is enough" (Giraud et al., Numer. Math. 101, 2005).
    """
    start = x.norm(dim=-2, keepdim=True)
    for _ in range(2):
        if against is not None:
            x = x - against @ (against.mT @ x)
    q, r = torch.linalg.qr(x)
    kept = r.diagonal(dim1=-2, dim2=-1).abs()[..., None, :] > 1e-13 * start.amax(-1, keepdim=True)
    if against is not None:
        q = q - against @ (against.mT @ q)
        q = q / q.norm(dim=-2, keepdim=True).clamp_min(2.0**-500)
    return torch.where(kept, q, 0.0)


def lanczos(
    apply: Apply, start: Tensor, steps: int, *, stop: Callable[[Krylov], bool] | None = None, every: int = 4
) -> Krylov:
    """Block Lanczos of a symmetric operator, from the block `start` (B, n, r), fully reorthogonalised.

    W = [W₁ … W_q], M W_j = W_{j-1}B_{j-1}ᵀ + W_jA_j + W_{j+1}B_j; every new block is projected against all before it.
    Arguments: `apply`, X (B, n, r) → M X; `steps` q; `stop` is asked after every `every` steps.
    Cost: q products with r columns and 4nr²q² flops. Accuracy: WᵀW = I to rounding.
    Source: Golub and Underwood (1977); Golub and Van Loan, Matrix Computations (2013), §10.3.

    >>> m = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))[None]
    >>> found = lanczos(lambda x: m @ x, torch.ones(1, 3, 1, dtype=torch.float64), 3)
    >>> torch.linalg.eigvalsh(found.t).round(decimals=6).tolist()
    [[1.0, 2.0, 3.0]]
    """
    batch, n, r = start.shape
    steps = max(1, min(steps, -(-n // r)))
    basis = start.new_zeros(batch, n, steps * r)
    t = start.new_zeros(batch, steps * r, steps * r)
    block = orthonormal(start)
    found = Krylov(basis[:, :, :0], t[:, :0, :0], block, r)
    for j in range(steps):
        here = slice(j * r, (j + 1) * r)
        basis[:, :, here] = block
        known = basis[:, :, : (j + 1) * r]
        image = apply(block)
        column = known.mT @ image
        t[:, : (j + 1) * r, here] = column
        t[:, here, : (j + 1) * r] = column.mT
        image = image - known @ column
        image = image - known @ (known.mT @ image)
        found = Krylov(known, t[:, : (j + 1) * r, : (j + 1) * r], image, r)
        last = j + 1 == steps
        if last or (stop is not None and (j + 1) % every == 0 and stop(found)):
            break
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
        gap = (middle[:, None] - w).clamp_min(2.0**-900)
        transfer = (last / gap[:, None, :]) @ first.mT
        allowed = size * transfer.flatten(1).norm(dim=1) >= g
        low, high = torch.where(allowed, middle, low), torch.where(allowed, high, middle)
    return theta, high + 8 * n * U * spread
