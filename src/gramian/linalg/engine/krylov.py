"""Block Lanczos with full reorthogonalization, and the bound on the largest eigenvalue that a run implies.

The library's only Lanczos iteration. Vectors are rows, since BLAS is fast at (few rows) × (a matrix) and slow at the
transpose of that. A run computes in the dtype of its start; `top_bound` takes a bound on its rounding as `noise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg.engine import lapack
from gramian.linalg.engine.probes import SEED
from gramian.linalg.engine.rounding import U, norm

Apply = Callable[[Tensor], Tensor]

FAILURE = 1e-10
"""The probability that one of the random events behind an estimate fails: 1e-10 for each event and matrix."""
CANCELED = 0.1
"""A block's image of which projection leaves less than this share is projected once more, and its rows of which that
leaves less than this length are dropped."""
CLOSE = 1.5
"""The ratio of successive distances from the Ritz value at which eigenvalues are tested for exclusion."""
BELOW = 6
"""How many such distances below the guess are tested."""
WHOLE = 512
"""Rows of a T that is factored whole for one λ: 1 ms at 336, where 21 blocks of 16 take 3."""
CHUNK = 64
"""Blocks for which a run has memory at first; it grows by half."""


class Krylov(NamedTuple):
    """M W = W T + F E_qᵀ + D: rows Wᵀ (B, p, n), orthonormal but for rounding, T (B, p, p) in float64, Fᵀ (B, r, n).

    D is what rounding added; r is the width of a block.
    """

    rows: Tensor
    t: Tensor
    residual: Tensor
    block: int


def default_generator(generator: torch.Generator | None) -> torch.Generator:
    """The caller's generator, or a fresh one of seed 0: never torch's global one, and the same answer every time."""
    return torch.Generator().manual_seed(SEED) if generator is None else generator


def gaussian(generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    """Standard normal float64 entries, drawn on the generator's device, on that of `like`."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).to(like.device)


def random_rows(generator: torch.Generator, like: Tensor, batch: int, r: int, n: int) -> Tensor:
    """Orthonormal rows (B, r, n) that span r Gaussian vectors, the same for the whole batch, in the dtype of `like`.

    Orthonormalized in float64: in float32, r = n Gaussian vectors are often numerically dependent.
    """
    return orthonormal(gaussian(generator, like, 1, r, n))[0].to(like.dtype).expand(batch, -1, -1)


def by(y: Tensor, a: Tensor) -> Tensor:
    """Y A of rows y (B, r, k) and a (B, k, n); one matrix goes to BLAS without its batch axis, which is faster."""
    if a.shape[0] == 1:
        r = y.shape[-2]
        if r == 1:
            return torch.mv(a[0].mT, y[0, 0])[None, None]
        if r % 16 == 0 and a.stride(-2) == 1:
            # 16 columns fill a register: the transposed product takes two thirds of the time on two cores.
            return torch.mm(a[0].mT, y[0].mT).mT[None]
        return torch.mm(y[0], a[0])[None]
    return y @ a


PANEL = 1 << 19
"""Entries of A that `forth_and_back` reads at once: 2 MB stay in the cache from the first product to the second."""


def forth_and_back(y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Y Aᵀ and Y AᵀA of rows y (B, r, n) and a (B, m, n); one large matrix stored by rows is read only once."""
    r, m, n = y.shape[-2], a.shape[-2], a.shape[-1]
    if a.shape[0] != 1 or r < 8 or a.device.type != "cpu" or a.stride(-1) != 1 or m * n <= PANEL:
        image = by(y, a.mT)
        return image, by(image, a)
    # Of 8 columns the transposed product takes a third of the time on an EPYC; 16 fill a register.
    columns = y[0].mT.contiguous() if r % 16 == 0 else y[0].mT
    image = y.new_empty(m, r) if r % 16 == 0 else y.new_empty(r, m).mT
    total = torch.zeros_like(y[0], memory_format=torch.contiguous_format)
    rows = max(64, PANEL // n)
    for panel, part in zip(a[0].split(rows), image.split(rows), strict=True):
        total.addmm_(torch.mm(panel, columns, out=part).mT, panel)
    return image.mT[None], total[None]


def orthonormal(z: Tensor, least: float | None = None) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that span those of z (B, r, n), and the smallest length (B,) left of a row beside the others.

    A row of which less than `least` is left becomes zero; if None, less than 100 roundings of the longest row.
    """
    start = z.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(z.dtype).tiny
    if z.shape[-2] == 1:
        return torch.where(start > max(tiny, least or 0.0), z / start.clamp_min(tiny), 0.0), start[:, 0, 0]
    q, r = torch.linalg.qr(z.mT)
    size = r.diagonal(dim1=-2, dim2=-1).abs()
    kept = size > (100 * torch.finfo(z.dtype).eps * start.amax(-2) if least is None else least)
    return torch.where(kept[..., None], q.mT, 0.0), size.amin(-1)


def lanczos(
    apply: Apply, start: Tensor, steps: int, *, stop: Callable[[Krylov], int] | None = None, first: int = 4
) -> Krylov:
    """Block Lanczos of a symmetric operator, from the rows of `start` (B, r, n), fully reorthogonalized.

    W = [W₁ … W_q], M W_j = W_{j-1}B_{j-1}ᵀ + W_jA_j + W_{j+1}B_j; every new block is projected against all before it.
    Rows of a block of which nothing but rounding is left, where the Krylov space is exhausted, are zero.

    Args:
        apply: rows X (B, r, n) → X M.
        start: (B, r, n), the rows that the first block spans.
        steps: q, the most there may be.
        stop: called with the run so far; returns 0 to stop, or after how many further steps to call it again.
        first: the steps before the first such call.
    Returns: the run.
    Cost: q products with r rows and 2nr²q² flops. Accuracy: WᵀW = I to rounding, but for the zero rows.
    Source: Golub and Underwood (1977); Golub and Van Loan, Matrix Computations (2013), §10.3.

    >>> m = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))[None]
    >>> found = lanczos(lambda x: x @ m, torch.ones(1, 1, 3, dtype=torch.float64), 3)
    >>> torch.linalg.eigvalsh(found.t).round(decimals=6).tolist()
    [[1.0, 2.0, 3.0]]
    """
    batch, r, n = start.shape
    steps = max(1, min(steps, -(-n // r)))
    # Most runs stop long before `steps`, for which there may be no memory.
    rows = start.new_empty(batch, min(steps, CHUNK) * r, n)
    t = start.new_empty(batch, steps * r, steps * r, dtype=torch.float64)
    block, _ = orthonormal(start)
    found = Krylov(rows[:, :0], t[:, :0, :0], block, r)
    due = first
    for j in range(steps):
        here, ahead = slice(j * r, (j + 1) * r), slice((j + 1) * r, (j + 2) * r)
        if j * r == rows.shape[1]:
            rows = torch.cat((rows, rows.new_empty(batch, min(steps - j, max(CHUNK, j // 2)) * r, n)), 1)
        rows[:, here] = block
        t[:, here, : max(0, j - 1) * r] = 0
        t[:, : max(0, j - 1) * r, here] = 0
        known = rows[:, : (j + 1) * r]
        image = apply(block)
        # The large components first, so that little is left to cancel.
        near = known[:, max(0, j - 1) * r :]
        inner = by(image, near.mT)
        own = inner[..., -r:].to(t.dtype)
        t[:, here, here] = (own + own.mT) / 2
        image = image - by(inner, near)
        before = image.norm(dim=-1).amax(-1)
        image = image - by(by(image, known.mT), known)
        found = Krylov(known, t[:, : (j + 1) * r, : (j + 1) * r], image, r)
        if j + 1 == steps:
            break
        if stop is not None and j + 1 == due:
            more = stop(found)
            if not more:
                break
            due += more
        block, least = orthonormal(image)
        # "Twice is enough" (Giraud et al., Numer. Math. 101, 2005), and once where little was taken away.
        if bool((least < CANCELED * before).any()):
            block = block - by(by(block, known.mT), known)
            # QR orthogonalizes against earlier rows, so those that have all but vanished come last. They had length 1:
            # what is left of them below CANCELED is rounding that need not be orthogonal to W.
            order = block.norm(dim=-1, keepdim=True).argsort(dim=-2, descending=True)
            block, _ = orthonormal(block.take_along_dim(order, -2), CANCELED)
        t[:, here, ahead] = by(image, block.mT).to(t.dtype)
        t[:, ahead, here] = t[:, here, ahead].mT
    return found


def overlap(n: int, r: int) -> float:
    """A g with P(‖uᵀW₁‖ < g) ≤ `FAILURE`, for a fixed unit u and the span W₁ of r Gaussian vectors in n dimensions.

    ‖uᵀW₁‖² is Beta(r/2, (n − r)/2), and P(Beta ≤ x) ≤ 1.5 x^(r/2) (n/2)^(r/2) / Γ(r/2 + 1) for x below 1/2.

    >>> overlap(1000, 1) < overlap(1000, 4) < 1
    True
    """
    if r >= n:
        return 1.0
    log_x = (math.log(FAILURE / 1.5) + math.lgamma(r / 2 + 1)) * 2 / r - math.log(n / 2)
    return math.exp(min(log_x, math.log(0.5)) / 2)


def two_norm(y: Tensor) -> Tensor:
    """‖Y‖₂ of short y (..., r, n)."""
    # LAPACK raises for what is not finite.
    squares = (y @ y.mT).nan_to_num(nan=2.0**1000, posinf=2.0**1000, neginf=2.0**1000)
    return lapack.small_eigvalsh(squares)[..., -1].clamp_min(0).sqrt().nan_to_num(nan=math.inf)


def ritz(found: Krylov) -> Tensor:
    """T's largest eigenvalue (B,)."""
    return lapack.small_eigvalsh(found.t)[:, -1]


def ritz_pairs(found: Krylov) -> tuple[Tensor, Tensor, Tensor]:
    """T's eigenvalues θ (B, p) ascending, its eigenvectors S (B, p, p), and the residual norms ‖MWsᵢ − θᵢWsᵢ‖₂ (B, p).

    ‖MWs − θWs‖ = ‖F E_qᵀs‖, so M has an eigenvalue that close to θ, but for rounding.
    """
    theta, s = lapack.small_eigh(found.t)
    f = found.residual.to(torch.float64)
    ends = s[:, s.shape[-1] - found.block :]
    return theta, s, (ends * (by(f, f.mT) @ ends)).sum(-2).clamp_min(0).sqrt()


def without_zero_rows(found: Krylov) -> Krylov:
    """The run of one matrix without the rows of W that vanished, where the space was exhausted."""
    kept = found.rows[0].norm(dim=-1) > 0.5
    if bool(kept.all()):
        return found
    last = int(kept[-found.block :].sum())
    residual = found.residual[:, kept[-found.block :]]
    return Krylov(found.rows[:, kept], found.t[:, kept][:, :, kept], residual, last)


def resolvent(found: Krylov, at: Tensor) -> tuple[Tensor, Tensor]:
    """(λ − T)⁻¹E₁ (B, L, p, r) at λ (B, L), and where λ is above all of T's eigenvalues (B, L).

    By block elimination, since T is block tridiagonal: S₁ = λ − A₁, S_{j+1} = λ − A_{j+1} − B_jᵀS_j⁻¹B_j. For one λ
    and a small T by a factor of the whole, which is fewer calls.
    """
    r, p = found.block, found.t.shape[-1]
    eye = torch.eye(r, dtype=at.dtype, device=at.device)
    if at.numel() == 1 and p <= WHOLE:
        shifted = -found.t
        shifted.diagonal(dim1=-2, dim2=-1).add_(at)
        factor, info = torch.linalg.cholesky_ex(shifted)
        above = info == 0
        if not bool(above):
            factor = torch.eye(p, dtype=at.dtype, device=at.device)[None]
        first = torch.eye(p, r, dtype=at.dtype, device=at.device)[None]
        return torch.cholesky_solve(first, factor)[:, None], above[:, None]
    shift, taken, above = at[..., None, None] * eye, torch.zeros_like(eye), torch.ones_like(at, dtype=torch.bool)
    y = eye.expand(*at.shape, r, r)
    solved: list[Tensor] = []
    for j in range(0, found.t.shape[-1], r):
        here = slice(j, j + r)
        beside = found.t[:, None, here, j + r : j + 2 * r]
        factor, info = torch.linalg.cholesky_ex(shift - found.t[:, None, here, here] - taken)
        above = above & (info == 0)
        factor = torch.where((info == 0)[..., None, None], factor, eye)
        solved.append(torch.cholesky_solve(torch.cat([y, beside.expand(*at.shape, -1, -1)], -1), factor))
        down = beside.mT @ solved[-1]
        y, taken = down[..., :r], down[..., r:]
    x = solved.pop()
    parts = [x]
    for part in reversed(solved):
        x = part[..., :r] + part[..., r:] @ x
        parts.append(x)
    return torch.cat(parts[::-1], -2), above


def top_vector(found: Krylov, theta: Tensor) -> Tensor:
    """T's leading eigenvector (B, p), nearly, from a step of inverse iteration close above its largest eigenvalue."""
    q = torch.linalg.qr(resolvent(found, (theta + 1e-9 * norm(found.t))[:, None])[0][:, 0]).Q
    return (q @ lapack.small_eigh(q.mT @ found.t @ q)[1])[:, :, -1]


def start_overlap(found: Krylov) -> float:
    """The g with P(‖uᵀW₁‖ < g) ≤ `FAILURE` for any unit u, W₁ being rounded."""
    eps = torch.finfo(found.rows.dtype).eps
    return max(overlap(found.rows.shape[-1], found.block) - 4 * math.sqrt(found.block) * eps, 2.0**-900)


def exclusion_ratio(found: Krylov, at: Tensor, noise: Tensor) -> Tensor:
    """(‖F E_qᵀ(λ − T)⁻¹E₁‖₂ + noise ‖(λ − T)⁻¹E₁‖₂) / g at λ (B, L), noise (B, L); below 1, λ is no eigenvalue."""
    solved, above = resolvent(found, at)
    upper = torch.linalg.qr(found.residual.to(torch.float64).mT, mode="r").R
    last = upper[:, None] @ solved[..., -found.block :, :]
    return torch.where(above, (two_norm(last) + noise * two_norm(solved.mT)) / start_overlap(found), math.inf)


def _far(found: Krylov, theta: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """The gap (B,) from θ beyond which there is no eigenvalue; inf where `share` is not far below g.

    ‖(λ − T)⁻¹‖ ≤ 1/(λ − θ), and so ‖E_qᵀ(λ − T)⁻¹E₁‖ ≤ Π ‖B_j‖ / (λ − θ)^q; both fall.
    """
    r, g = found.block, start_overlap(found)
    steps = found.t.shape[-1] // r
    size = two_norm(found.residual.to(torch.float64))
    logs = size.clamp_min(2.0**-900).log() + math.log(2 / g)
    if steps > 1:
        beside = torch.stack([found.t[:, j : j + r, j + r : j + 2 * r] for j in range(0, (steps - 1) * r, r)], 1)
        logs = logs + two_norm(beside).clamp_min(2.0**-900).log().sum(-1)
    known = noise + share * theta.abs()
    near = torch.maximum((logs / steps).exp(), known / (g / 2 - share).clamp_min(2.0**-900))
    near = torch.where(share < 0.45 * g, near, math.inf)
    simple = torch.where(share < 0.9 * g, (size + known) / (g - share).clamp_min(2.0**-900), math.inf)
    return 1.01 * torch.minimum(near, simple)


def top_bound(found: Krylov, theta: Tensor, near: Tensor, *, noise: Tensor, share: Tensor | None = None) -> Tensor:
    """With probability 1 − `FAILURE` an upper bound (B,) on the largest eigenvalue; θ is T's, `near` a guess above it.

    For an eigenpair (λ, u), uᵀM W = λ uᵀW gives uᵀW₁ = uᵀ(F E_qᵀ + D)(λ − T)⁻¹E₁, whatever W is; as ‖uᵀW₁‖ ≥ g but with
    small probability, λ > θ requires ‖F E_qᵀ(λ − T)⁻¹E₁‖ + ‖D‖ ‖(λ − T)⁻¹E₁‖ ≥ g. `noise` + `share` · λ (B,) bounds
    ‖Dᵀu‖. With one vector in a block the left side falls with λ; with more it need not (a test has it rise fivefold),
    so λ's are tested whose distances from θ grow by `CLOSE`, up to where a cruder bound, which does fall, is below g:
    the answer is the least of them from which on all are excluded.
    Source: van Dorsselaer, Hochstenbach, van der Vorst, SIAM J. Matrix Anal. Appl. 22 (2000), §3, here for blocks.
    """
    share = torch.zeros_like(theta) if share is None else share
    spread = norm(found.t)
    exact = (spread == 0) & (norm(found.residual) == 0) & (noise == 0) & (share == 0)
    # The factorization of λ − T rounds too.
    noise = noise + 8 * found.t.shape[-1] * U * spread
    far = _far(found, theta, noise, share)
    known = far.isfinite()
    gap = torch.where(near > theta, near - theta, 1e-3 * torch.where(known, far, 1.0))
    lowest = (spread * 1e-16).clamp_min(2.0**-380)
    gap = gap.maximum(lowest)
    ratio = (torch.where(known, far, gap) / gap).clamp(1, 2.0**100)
    above = math.ceil(math.log(max([1.0, *ratio.tolist()])) / math.log(CLOSE))

    def least(gap: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """The least of gap · CLOSE^low to gap · CLOSE^high from which on all are excluded; whether it is the first."""
        gaps = gap[:, None] * CLOSE ** torch.arange(low, high + 1, dtype=gap.dtype, device=gap.device)
        at = theta[:, None] + gaps
        excluded = (exclusion_ratio(found, at, noise[:, None] + share[:, None] * at) < 1) | (gaps >= far[:, None])
        free = (~excluded).flip(-1).cumsum(-1).eq(0).sum(-1)
        count = gaps.shape[-1]
        first = gaps.gather(-1, (count - free).clamp_max(count - 1)[:, None])[:, 0]
        return torch.where(known & (free > 0), first, math.inf), free == count

    high, all_ = least(gap, -BELOW, above)
    while bool((all_ & (high > far.maximum(lowest))).any()):
        lower, more = least(high, -2 * BELOW, -1)
        high, all_ = torch.where(all_, high.minimum(lower), high), all_ & more
    high = torch.where(known, high.minimum(far), math.inf)
    return torch.where(exact, 0.0, theta + high + 8 * found.rows.shape[-1] * U * spread)


def next_check(found: Krylov, before: tuple[int, Tensor] | None, now: Tensor) -> int:
    """Steps until `exclusion_ratio` should be computed again, from its fall since `before`: that step, and its log."""
    step = found.t.shape[-1] // found.block
    if before is None:
        return 2
    fall = ((before[1] - now) / (step - before[0])).clamp_min(1e-3)
    left = (now.clamp_min(0) / fall).nan_to_num(nan=1.0, posinf=1.0)
    # It falls faster with every step, so this is rather too many: 0.95, and at least 1.
    return max(1, min(int(0.95 * float(left.amax())), 2 * step))
