"""The largest singular values, and the share of the spectrum above any level, from a few products with a matrix.

One run of block Lanczos on WᵀW (`linalg.engine.krylov`) gives both: its Ritz values converge to the largest singular
values squared, and its random starting block makes them the nodes of a quadrature over the whole spectrum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.linalg.engine import krylov
from gramian.linalg.engine.precision import in_full_precision

__all__ = ["Quadrature", "energy_rank_interval", "largest_singular_value", "leading_vectors", "sample_spectrum"]

# A Ritz value counts as found where its residual is below this share of it.
CONVERGED = 1e-2

# Squares of singular values below this share of the largest are not resolved in float32.
RESOLVED = 1e-4

# Standard errors by which the mean weight of close values may exceed 1, the mean weight of a single value.
WEIGHT_ERRORS = 5.0

# The half-width of an energy rank's interval: this many standard errors over the starting vectors, this share of the
# quadrature's spacing at the crossing, and 1. Set on frozen spectra and scored on fresh ones by
# benchmarks/inspect_calibration.py.
NUM_ERRORS = 4.0
SPACING = 0.5


@dataclass(frozen=True)
class Quadrature:
    """Block Lanczos's quadrature of the spectrum of WᵀW, n × n: xⱼᵀ f(WᵀW) xⱼ ≈ Σᵢ weights[i, j] f(values[i]).

    Attributes:
        n: the number of eigenvalues of WᵀW.
        values: the Ritz values σ², largest first.
        residuals: of the Ritz pairs; WᵀW has an eigenvalue within each of its Ritz value.
        weights: by Ritz value i and starting vector xⱼ.
    """

    n: int
    values: Float[Tensor, " k"]
    residuals: Float[Tensor, " k"]
    weights: Float[Tensor, "k b"]

    def cpu(self) -> Quadrature:
        """The same, on the CPU."""
        return Quadrature(self.n, self.values.cpu(), self.residuals.cpu(), self.weights.cpu())

    @property
    def num_converged(self) -> int:
        """How many of the largest values have converged to singular values of multiplicity one.

        A run sees a repeated value at most once for each starting vector. Values closer than `CONVERGED` count as one
        repeated value where there are more of them than vectors, or where the mean of their weights is above 1.
        """
        bad = self.residuals > CONVERGED * self.values
        found = int(bad.long().argmax()) if bool(bad.any()) else len(self.values)
        block = self.weights.shape[1]
        if len(self.values) == self.n:  # the Krylov space is the whole space: no value is missing
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


@in_full_precision
def sample_spectrum(w: Float[Tensor, "m n"], block: int, steps: int) -> Quadrature:
    """Run block Lanczos on WᵀW from Gaussian vectors and return the quadrature that it defines.

    Args:
        w: `(m, n)`, m ≥ n, float32 or float64, scaled so that σ₁² neither overflows nor underflows.
        block: the number of starting vectors, at most n of which are used.
        steps: products with W and with Wᵀ; fewer where the Krylov space is the whole space before.

    Returns: the Ritz values with their residuals and weights.

    Cost: 4 · block · steps · m n operations. Accuracy: WᵀW has an eigenvalue within each value's residual.

    Source: Golub & Meurant, Matrices, Moments and Quadrature (2010), §4.3.
    """
    n = w.shape[1]
    generator = torch.Generator(w.device).manual_seed(0)
    start = torch.randn(n, min(block, n), dtype=w.dtype, device=w.device, generator=generator).mT[None]
    found = _run(w, start, steps)
    values, s, residuals = krylov.ritz_pairs(found)
    first = krylov.by(found.rows[:, : start.shape[1]], start.mT).double()  # Wᵀ₁X of the starting vectors X
    weights = (s[:, : start.shape[1]].mT @ first).square()
    return Quadrature(n, values[0].flip(0).clamp_min(0.0), residuals[0].flip(0), weights[0].flip(0))


def _run(w: Float[Tensor, "m n"], start: Float[Tensor, "1 b n"], steps: int) -> krylov.Krylov:
    """Block Lanczos on WᵀW from the rows of `start`."""
    matrix = w[None]
    found = krylov.lanczos(lambda y: krylov.by(krylov.by(y, matrix.mT), matrix), start, steps)
    return krylov.without_zero_rows(found)


def largest_singular_value(w: Float[Tensor, "m n"]) -> float:
    """Return σ₁ to some 1e-3, from 12 steps of block 8. Cost: 24 products with 8 vectors."""
    return math.sqrt(float(sample_spectrum(w, 8, 12).values[0]))


@in_full_precision
def leading_vectors(w: Float[Tensor, "m n"], count: int) -> tuple[Float[Tensor, "n k"], Float[Tensor, " k"]]:
    """Return the leading right singular vectors and their values, in float64.

    For a side of at most 1024 from the Gram matrix's eigenvectors, in float32 where these resolve the values; else
    from 9 steps of block Lanczos on `count + 8` vectors. Within these directions they are exact. Scaled by the largest
    entry, so that any dtype's range is safe.

    Args:
        w: `(m, n)`, finite.
        count: the number of vectors.

    Returns: the vectors as columns `(n, count)`, and the singular values, largest first.
    """
    unit = float(w.abs().max()) or 1.0
    m, n = w.shape
    x, width = (w / unit).float(), min(count + 8, n, m)
    if n <= 1024:
        squares, vectors = torch.linalg.eigh(x.mT @ x)
        if squares[-count] < RESOLVED * squares[-1]:
            x = w.double() / unit
            squares, vectors = torch.linalg.eigh(x.mT @ x)
        basis = vectors[:, -width:].mT.double()
    else:
        generator = torch.Generator(w.device).manual_seed(0)
        start = torch.randn(n, width, device=w.device, generator=generator).mT[None]
        found = _run(x, start, 9)
        s = krylov.ritz_pairs(found)[1]
        basis = s[0, :, -width:].mT @ found.rows[0].double()
    # The singular values of W restricted to these vectors.
    _, values, v = torch.linalg.svd((x @ basis.to(x.dtype).mT).double(), full_matrices=False)
    return (v @ basis).mT[:, :count], values[:count] * unit


def energy_rank_interval(quadrature: Quadrature, square_sum: float, share: float) -> tuple[float, float, float]:
    """Return (least, estimate, most) of the rank that holds a share of the energy ‖W‖_F² = `square_sum`.

    Each converged value counts as one. The number and the energy of the others are known exactly, and are spread over
    the other nodes by their weights. The interval adds the jackknife's error over the starting vectors and the spacing
    of the nodes.

    Args:
        quadrature: from `sample_spectrum`.
        square_sum: ‖W‖_F².
        share: of the energy, 0 to 1.

    Returns: the ends of the interval, and the estimate between them.

    Cost: a few passes over the nodes for each starting vector.

    Source: Lin, Saad & Yang, SIAM Review 58 (2016), §3.2; the jackknife is Efron, Ann. Statist. 7 (1979).
    """
    block = quadrature.weights.shape[1]
    estimate, spacing = _rank(quadrature, quadrature.weights.mean(1), square_sum, share)
    least = quadrature.num_converged
    if estimate <= least and estimate < quadrature.n:
        return estimate - 1, estimate, estimate + 1
    total = quadrature.weights.sum(1)
    left_out = [_rank(quadrature, total - quadrature.weights[:, j], square_sum, share)[0] for j in range(block)]
    mean = sum(left_out) / block
    error = math.sqrt((block - 1) / block * sum((x - mean) ** 2 for x in left_out))
    half = NUM_ERRORS * error + SPACING * spacing + 1
    return max(1.0, estimate - half), estimate, min(float(quadrature.n), estimate + half)


def _rank(quadrature: Quadrature, weights: Tensor, square_sum: float, share: float) -> tuple[float, float]:
    """Return the energy rank by one quadrature, and how many singular values its nodes near the crossing stand for."""
    found = quadrature.num_converged
    head = quadrature.values[:found]
    wanted = share * square_sum
    energy = head.cumsum(0)
    if found and float(energy[-1]) >= wanted:
        return float((energy < wanted).sum()) + 1, 1.0
    rest = weights[found:].clamp_min(0.0)
    nodes = quadrature.values[found:]
    num_rest, energy_rest = quadrature.n - found, max(square_sum - float(head.sum()), 0.0)
    if not len(nodes) or not float(rest.sum()) > 0 or not float((rest * nodes).sum()) > 0:
        return float(quadrature.n), float(num_rest)
    counts = rest / rest.sum() * num_rest
    energies = rest * nodes / (rest * nodes).sum() * energy_rest
    reached = energies.cumsum(0) + float(head.sum())
    place = min(int((reached < wanted).sum()), len(nodes) - 1)
    before = float(reached[place]) - float(energies[place])
    part = (wanted - before) / float(energies[place]) if float(energies[place]) > 0 else 1.0
    block = quadrature.weights.shape[1]
    near = counts[max(0, place - block // 2) : place + block // 2 + 1]
    return found + float(counts[:place].sum()) + min(max(part, 0.0), 1.0) * float(counts[place]), float(near.sum())
