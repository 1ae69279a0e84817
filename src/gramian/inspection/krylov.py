"""Block Lanczos on WᵀW: the largest singular values, and the distribution of all of them, from a few products.

One run serves both: its Ritz values converge to the largest singular values, and its random starting block is a
quadrature for the share of the spectrum above any level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Krylov", "block_lanczos", "energy_rank_interval", "largest_singular_value", "leading_vectors"]

# A Ritz value counts as found where its residual is below this share of it.
CONVERGED = 1e-2

# Standard errors by which the mean weight of close values may pass 1, that of single ones.
WEIGHT_ERRORS = 5.0

# The half-width of an energy rank's interval: so many standard errors over the starting vectors, so much of the
# quadrature's spacing at the crossing, and one. Set on frozen spectra and scored on fresh ones by
# benchmarks/inspect_calibration.py.
NUM_ERRORS = 4.0
SPACING = 0.5


@dataclass(frozen=True)
class Krylov:
    """What block Lanczos knows of WᵀW, n × n: Ritz `values` σ², largest first, and the `residuals` of their pairs.

    `weights[i, j]` is what starting vector j gives value i in the quadrature xⱼᵀ f(WᵀW) xⱼ = Σᵢ weights[i, j] f(σᵢ²).
    """

    n: int
    values: Float[Tensor, " k"]
    residuals: Float[Tensor, " k"]
    weights: Float[Tensor, "k b"]

    def cpu(self) -> Krylov:
        """The same, in the main memory."""
        return Krylov(self.n, self.values.cpu(), self.residuals.cpu(), self.weights.cpu())

    @property
    def num_converged(self) -> int:
        """How many of the largest values are found, from the first on, each of multiplicity one.

        A block sees a value at most once for each of its vectors. Values closer than `CONVERGED` count as one of higher
        multiplicity where there are more of them than vectors, or where the mean of their weights is above 1.
        """
        bad = self.residuals > CONVERGED * self.values
        found = int(bad.long().argmax()) if bool(bad.any()) else len(self.values)
        block = self.weights.shape[1]
        if len(self.values) == self.n:  # the whole space: nothing is left to be seen
            return found
        first = 0
        while first < found:
            close = self.values[first:found] >= (1 - CONVERGED) * self.values[first]
            size = int(close.sum())
            mean = float(self.weights[first : first + size].mean())
            if size > block or mean > 1 + WEIGHT_ERRORS * math.sqrt(2 / (size * block)):
                return first
            first += size
        return found


def block_lanczos(w: Float[Tensor, "m n"], block: int, steps: int, seed: int = 0) -> Krylov:
    """Run block Lanczos on WᵀW, m ≥ n, from a Gaussian block, with full reorthogonalization.

    Args:
        w: float32 or float64, scaled so that σ₁² neither overflows nor vanishes.
        block: vectors in the starting block.
        steps: products with W and with Wᵀ; ends sooner where the Krylov space fills the whole space.

    Cost: 4 · block · steps · m n operations. Accuracy: a Ritz value is within its residual of a singular value squared.

    Source: Golub & Underwood, The block Lanczos method (1977); Golub & Meurant, Matrices, Moments and Quadrature
    (2010), §4.3.
    """
    n = w.shape[1]
    block = min(block, n)
    generator = torch.Generator(w.device).manual_seed(seed)
    start = torch.randn(n, block, dtype=w.dtype, device=w.device, generator=generator)
    q, r0 = torch.linalg.qr(start)
    basis = q
    t = torch.zeros(0, 0, dtype=torch.float64, device=w.device)
    while True:
        z = w.mT @ (w @ q)
        h = basis.mT @ z
        z = z - basis @ h
        again = basis.mT @ z  # twice is enough (Kahan, in Parlett, The Symmetric Eigenvalue Problem, §6.9)
        z = z - basis @ again
        h = (h + again).double()
        old, width = t.shape[0], q.shape[1]
        grown = torch.zeros(old + width, old + width, dtype=torch.float64, device=w.device)
        grown[:old, :old] = t
        grown[:, old:] = h
        grown[old:, :] = h.mT
        t = grown
        room = n - basis.shape[1]
        steps -= 1
        if steps == 0 or room == 0:
            break
        q, _ = torch.linalg.qr(z)
        q = q[:, :room]
        q = torch.linalg.qr(q - basis @ (basis.mT @ q)).Q  # where z has lost its rank, QR's vectors are arbitrary
        basis = torch.cat((basis, q), 1)
    values, y = torch.linalg.eigh((t + t.mT) / 2)
    last = (
        torch.linalg.qr(z, mode="r").R.double() if room else torch.zeros(1, width, dtype=torch.float64, device=w.device)
    )
    residuals = (last @ y[-width:]).norm(dim=0)
    weights = (y[:block].mT @ r0.double()).square()
    return Krylov(n, values.flip(0).clamp_min(0.0), residuals.flip(0), weights.flip(0))


def largest_singular_value(w: Float[Tensor, "m n"]) -> float:
    """Return σ₁ to some 1e-3, from 12 steps of block 8. Cost: 24 products with 8 vectors."""
    return math.sqrt(float(block_lanczos(w, 8, 12).values[0]))


def leading_vectors(w: Float[Tensor, "m n"], count: int) -> tuple[Float[Tensor, "n k"], Float[Tensor, " k"]]:
    """Return the leading right singular vectors and their values, in float64.

    Exactly, from the Gram matrix's eigenvectors, for a side of at most 1024; else by subspace iteration, 8 steps on
    `count + 8` vectors. Scaled by the largest entry, so that any dtype's range is safe.
    """
    unit = float(w.abs().max()) or 1.0
    m, n = w.shape
    if n <= 1024:
        x = w.double() / unit
        values, vectors = torch.linalg.eigh(x.mT @ x)
        return vectors[:, -count:].flip(1), values[-count:].flip(0).clamp_min(0.0).sqrt() * unit
    x = (w / unit).float()
    generator = torch.Generator(w.device).manual_seed(0)
    q = torch.randn(n, min(count + 8, n, m), device=w.device, generator=generator)
    for _ in range(8):
        q = torch.linalg.qr(x.mT @ (x @ torch.linalg.qr(q).Q)).Q
    _, s, v = torch.linalg.svd((x @ q).double(), full_matrices=False)
    return (q.double() @ v.mT)[:, :count], s[:count] * unit


def energy_rank_interval(krylov: Krylov, square_sum: float, share: float) -> tuple[float, float, float]:
    """Return (least, estimate, most) of the rank that holds a share of the energy ‖W‖_F² = `square_sum`.

    The values that are found count one each; the rest of the n is spread as the quadrature says, its number and its
    energy being known exactly. The interval is from leaving out one starting vector at a time, and from the
    quadrature's spacing.

    Source: Lin, Saad & Yang, SIAM Review 58 (2016), §3.2; the jackknife is Efron, Ann. Statist. 7 (1979).
    """
    block = krylov.weights.shape[1]
    estimate, spacing = _rank(krylov, krylov.weights.mean(1), square_sum, share)
    least = krylov.num_converged
    if estimate <= least and estimate < krylov.n:
        return estimate - 1, estimate, estimate + 1
    total = krylov.weights.sum(1)
    left_out = [_rank(krylov, total - krylov.weights[:, j], square_sum, share)[0] for j in range(block)]
    mean = sum(left_out) / block
    error = math.sqrt((block - 1) / block * sum((x - mean) ** 2 for x in left_out))
    half = NUM_ERRORS * error + SPACING * spacing + 1
    return max(1.0, estimate - half), estimate, min(float(krylov.n), estimate + half)


def _rank(krylov: Krylov, weights: Tensor, square_sum: float, share: float) -> tuple[float, float]:
    """Return the energy rank by one quadrature, and how many singular values its nodes near the crossing stand for."""
    found = krylov.num_converged
    head = krylov.values[:found]
    wanted = share * square_sum
    energy = head.cumsum(0)
    if found and float(energy[-1]) >= wanted:
        return float((energy < wanted).sum()) + 1, 1.0
    rest = weights[found:].clamp_min(0.0)
    nodes = krylov.values[found:]
    num_rest, energy_rest = krylov.n - found, max(square_sum - float(head.sum()), 0.0)
    if not len(nodes) or not float(rest.sum()) > 0 or not float((rest * nodes).sum()) > 0:
        return float(krylov.n), float(num_rest)
    counts = rest / rest.sum() * num_rest
    energies = rest * nodes / (rest * nodes).sum() * energy_rest
    reached = energies.cumsum(0) + float(head.sum())
    place = min(int((reached < wanted).sum()), len(nodes) - 1)
    before = float(reached[place]) - float(energies[place])
    part = (wanted - before) / float(energies[place]) if float(energies[place]) > 0 else 1.0
    block = krylov.weights.shape[1]
    near = counts[max(0, place - block // 2) : place + block // 2 + 1]
    return found + float(counts[:place].sum()) + min(max(part, 0.0), 1.0) * float(counts[place]), float(near.sum())
