"""Norms and ranks of a large matrix from a few products, with error bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.checkpoint.formats import dtype_name
from gramian.inspection.weights.entries import count_entries
from gramian.inspection.weights.quadrature import energy_rank_interval, sample_spectrum
from gramian.inspection.weights.spectra import (
    ENERGIES,
    Spectrum,
    check_matrix,
    describe,
    scale_of,
    slices,
    without_spectrum,
)

__all__ = ["describe_quickly"]

EXACT_SIDE = 256  # up to this side, all singular values cost no more than a few
BLOCK, STEPS = 16, 12
ROUNDING = 5e-6  # error of float32 products, relative to σ₁


@torch.no_grad()
def describe_quickly(w: Float[Tensor, "m n"]) -> Spectrum:
    """Return norms, stable rank and energy ranks by block Lanczos, with intervals; matrices of side ≤ 256 exactly.

    σ₁ is within `spectral_norm_error` of `spectral_norm`, and an energy rank within its interval, except with a
    probability below 1 % (measured: benchmarks/results/inspect_calibration.json). What needs all singular values is
    `None`.

    Args:
        w: `(m, n)`, as in `describe`.
    Returns: the spectrum, with those singular values that have converged.
    Raises:
        ShapeError: w is not a matrix.
        DtypeError: w is not float64, float32, float16 or bfloat16.
    Cost: 12 products with W and Wᵀ and a block of 16 vectors, in float32. Memory: one copy in float32.
    Source: Golub & Underwood 1977 (block Lanczos); the intervals of energy ranks are this library's own.

    >>> w = torch.randn(500, 400, generator=torch.Generator().manual_seed(0))
    >>> spectrum = describe_quickly(w)
    >>> exact = float(torch.linalg.matrix_norm(w, 2))
    >>> abs(spectrum.spectral_norm - exact) <= spectrum.spectral_norm_error
    True
    """
    check_matrix("describe_quickly", w)
    if min(w.shape) <= EXACT_SIDE:
        return describe(w)
    tall = w.detach() if w.shape[0] >= w.shape[1] else w.detach().mT
    entries = count_entries(slices(tall))
    spectrum = Spectrum((w.shape[0], w.shape[1]), dtype_name(w), entries=entries)
    empty = without_spectrum(spectrum)
    if empty is not None:
        return empty
    unit = 2.0 ** scale_of(entries.largest)
    scaled = (tall.double() / unit if w.dtype == torch.float64 else tall.float() / unit).float()
    square_sum = float(torch.linalg.vector_norm(scaled, dtype=torch.float64)) ** 2
    sampled = sample_spectrum(scaled, BLOCK, STEPS).cpu()
    first = math.sqrt(float(sampled.values[0]))
    # λ₁ is between the Ritz value, which is never above it, and that plus the residual
    error = math.sqrt(float(sampled.values[0] + sampled.residuals[0])) - first + ROUNDING * first
    frobenius = math.sqrt(square_sum)
    ranks = []
    for share in ENERGIES:
        low, _, high = energy_rank_interval(sampled, square_sum, share)
        ranks.append((max(1, math.floor(low)), min(sampled.n, math.ceil(high))))
    found = sampled.values[: sampled.num_converged].sqrt() * unit
    norms = (frobenius * unit, first * unit)
    if not all(math.isfinite(norm) for norm in norms):
        return replace(spectrum, notes=("norms beyond float64",))
    return replace(
        spectrum,
        singular_values=tuple(found.tolist()),
        frobenius_norm=norms[0],
        spectral_norm=norms[1],
        spectral_norm_error=error * unit,
        stable_rank=(frobenius / first) ** 2,
        energy_ranks=tuple(ranks),
        method="krylov",
        notes=(f"quick: σ₁ ± {error / first:.0e}, energy ranks are intervals",),
    )
