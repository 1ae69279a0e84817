"""Statistics of one matrix: its singular values, norms and ranks, and counts of its entries.

The input is one matrix, the output plain numbers. The matrix is read in float64 slices along its longer side, so that
besides the matrix itself memory holds a few matrices of its smaller side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.checkpoint.formats import dtype_name
from gramian.errors import DtypeError, ShapeError
from gramian.inspection.weights.entries import Entries, clipped, count_entries
from gramian.inspection.weights.noise import Noise, against_noise
from gramian.inspection.weights.quadrature import largest_singular_value
from gramian.inspection.weights.ranks import rank_above_rounding
from gramian.inspection.weights.tail import Tail, fit_tail

__all__ = ["Spectrum", "check_matrix", "describe", "energy_rank"]

# Below this σ/σ_max the Gram matrix loses digits: the error of an eigenvalue is about 8 ε₆₄ σ_max², so the relative
# error of σ is 4 ε₆₄ (σ_max/σ)², which is 1e-6 here. tests/test_spectra.py measures it.
GRAM_FLOOR = 3e-5

EPS = torch.finfo(torch.float64).eps
SLICE = 1 << 20  # elements read at a time: 8 MB in float64
COLUMNS = 256  # smallest width of a block of the Gram matrix; only blocks on and below the diagonal are computed

# If at most this share of the singular values is below the floor, inverse iteration computes them at a hundredth of
# the cost of an SVD. A Gaussian square matrix of side 4096 has about one such value.
FEW = 1 / 32

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NARROW = (torch.float16, torch.bfloat16)

ENERGIES = (0.90, 0.99)  # shares of the energy ‖W‖_F² whose ranks are reported


@dataclass(frozen=True)
class Spectrum:
    """Statistics of one matrix; what is undefined or was not computed is `None`, and `notes` say why.

    Args:
        shape: (m, n).
        dtype: torch's name, `"float32"`.
        singular_values: largest first; those of a quick spectrum are only the ones that have converged.
        frobenius_norm: ‖W‖_F.
        spectral_norm: σ₁.
        spectral_norm_error: bound on its error.
        condition: σ₁ / σ_min.
        stable_rank: ‖W‖_F² / σ₁².
        effective_rank: exp of the entropy of σᵢ² / ‖W‖_F².
        numerical_rank: number of σᵢ above rounding.
        energy_ranks: the smallest ranks that hold 90 and 99 % of ‖W‖_F², each as an interval (low, high), whose ends
            are equal where all singular values are known.
        noise: comparison with a matrix of independent entries.
        tail: power-law fit of the largest eigenvalues σ².
        entries: counts of entries.
        method: how the singular values were computed: `"gram"`, `"gram+inverse"`, `"qr"`, `"krylov"`, or empty.
        notes: why something is missing.
    """

    shape: tuple[int, int]
    dtype: str
    singular_values: tuple[float, ...] = ()
    frobenius_norm: float | None = None
    spectral_norm: float | None = None
    spectral_norm_error: float = 0.0
    condition: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    numerical_rank: int | None = None
    energy_ranks: tuple[tuple[int, int], ...] = ()
    noise: Noise | None = None
    tail: Tail | None = None
    entries: Entries = field(default_factory=Entries)
    method: str = ""
    notes: tuple[str, ...] = ()

    @property
    def num_nonfinite(self) -> int:
        """Number of entries that are NaN or infinite."""
        return self.entries.num_nonfinite

    @property
    def num_zeros(self) -> int:
        """Number of entries that are exactly zero."""
        return self.entries.num_zeros

    @property
    def overflows(self) -> dict[str, int]:
        """Number of finite entries that a cast makes infinite, by dtype."""
        return dict(self.entries.overflows)

    @property
    def underflows(self) -> dict[str, int]:
        """Number of nonzero entries that a cast makes zero, by dtype."""
        return dict(self.entries.underflows)


@torch.no_grad()
def describe(w: Float[Tensor, "m n"]) -> Spectrum:
    """Return the singular values of a matrix, its norms and ranks, and counts of unusual entries.

        stable rank      ‖W‖_F² / σ₁²
        effective rank   exp(−Σ pᵢ log pᵢ),  pᵢ = σᵢ² / Σ σⱼ²
        numerical rank   the number of σᵢ > max(m, n) ε σ₁
        condition        σ₁ / σ_min
        energy rank      the least k with Σᵢ≤ₖ σᵢ² ≥ q Σ σⱼ²,  q = 0.90 and 0.99

    The effective rank is Roy & Vetterli's with shares of the energy σ² in place of σ, so that
    1 ≤ stable rank ≤ effective rank ≤ rank. For float16 and bfloat16, where max(m, n) ε soon exceeds 1, the numerical
    rank is the number of σᵢ above the norm of rounding errors, ½ ε (√m + √n) ‖W‖_F / √(mn).

    Args:
        w: `(m, n)`, float64, float32, float16 or bfloat16, of any scale. NaN, infinities and zeros are reported, and
            raise nothing.
    Returns: the spectrum.
    Raises:
        ShapeError: w is not a matrix.
        DtypeError: w is not of one of these dtypes.
    Cost: for m ≥ n, half a product m n² and the eigenvalues of an n × n matrix; where σ_min/σ₁ < 3e-5, which the Gram
        matrix cannot resolve, also a QR factorization, and inverse iteration on R for a few such values or its SVD for
        many. Memory: a few n × n matrices in float64. Accuracy: 1e-6 relative for σ > 1e-10 σ₁, and 1e-16 σ₁ below,
        times a slowly growing function of n.
    Source: Roy & Vetterli, The effective rank (EUSIPCO 2007), eq. 1–3; Golub & Van Loan, Matrix Computations, §5.4.1.

    >>> spectrum = describe(torch.diag(torch.tensor([3.0, 4.0])))
    >>> spectrum.singular_values, spectrum.frobenius_norm, round(spectrum.stable_rank, 6)
    ((4.0, 3.0), 5.0, 1.5625)
    """
    check_matrix("describe", w)
    m, n = w.shape
    tall = w.detach() if m >= n else w.detach().mT
    entries = count_entries(slices(tall))
    spectrum = Spectrum((m, n), dtype_name(w), entries=entries)
    empty = without_spectrum(spectrum)
    if empty is not None:
        return empty
    exponent = scale_of(entries.largest)
    try:
        sigma, method = _singular_values(tall, 2.0**-exponent)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return replace(spectrum, notes=("LAPACK did not converge: no spectrum",))
    sigma = sigma.cpu()
    spectrum = _derive(replace(spectrum, method=method), sigma, w.dtype, 2.0**exponent)
    if not spectrum.singular_values:
        return spectrum
    noise = against_noise(sigma, (m, n), _clipped_top(tall, entries, 2.0**-exponent))
    if noise is not None:
        noise = replace(noise, edge=noise.edge * 2.0**exponent)
    return replace(spectrum, noise=noise, tail=fit_tail(sigma))


def check_matrix(name: str, w: Tensor) -> None:
    """Raise unless `w` is a matrix of one of `DTYPES`."""
    if w.ndim != 2:
        raise ShapeError(
            f"{name}: expected (m, n), got {tuple(w.shape)}. gramian.blocks splits a parameter into matrices."
        )
    if w.dtype not in DTYPES:
        raise DtypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {w.dtype}. Dequantize it first.")


def without_spectrum(spectrum: Spectrum) -> Spectrum | None:
    """Return the spectrum of a matrix that is not finite, empty or zero; `None` for any other matrix."""
    if spectrum.num_nonfinite:
        return replace(spectrum, notes=(f"{spectrum.num_nonfinite} entries are not finite: no spectrum",))
    if spectrum.entries.largest > 0:
        return None
    what = "no entries" if 0 in spectrum.shape else "all entries are zero"
    return replace(
        spectrum,
        singular_values=(0.0,) * min(spectrum.shape),
        frobenius_norm=0.0,
        spectral_norm=0.0,
        numerical_rank=0,
        energy_ranks=((0, 0),) * len(ENERGIES),
        notes=(f"{what}: no condition and no share of energy",),
    )


def scale_of(largest: float) -> int:
    """Return the power of two, as its exponent, that scales entries to about 1 without rounding."""
    return min(max(math.frexp(largest)[1], -1000), 1000)


def energy_rank(sigma: Float[Tensor, " k"], share: float) -> int:
    """Return the smallest rank that holds a share of the energy Σ σ², with the values largest first.

    >>> energy_rank(torch.tensor([4.0, 1.0, 0.1]), 0.9)
    1
    """
    energy = sigma.double().square().cumsum(0)
    # At most all of them, whatever rounding does.
    return min(int((energy < share * float(energy[-1])).sum()) + 1, len(sigma)) if len(sigma) else 0


def _derive(spectrum: Spectrum, sigma: Float[Tensor, " k"], dtype: torch.dtype, unit: float) -> Spectrum:
    """Fill in norms and ranks from the singular values, which are in units of `unit`, largest first."""
    m, n = spectrum.shape
    first, last, frobenius = float(sigma[0]), float(sigma[-1]), float(sigma.square().sum().sqrt())
    share = (sigma / frobenius).square()
    eps = torch.finfo(dtype).eps
    if dtype in NARROW:
        rank = rank_above_rounding(sigma.tolist(), (m, n), eps / 2 * frobenius / math.sqrt(m * n))
    else:
        rank = int((sigma > max(m, n) * eps * first).sum())
    # Norms can overflow float64 where entries do not.
    values = tuple((sigma * unit).tolist())
    notes = []
    resolved = max(m, n) * torch.finfo(torch.float64).eps  # smallest σ/σ₁ that float64 resolves
    if last <= resolved * first:
        notes.append(f"singular in float64: the condition is above {1 / resolved:.0e} or infinite")
    if not math.isfinite(frobenius * unit):
        notes.append("norms and singular values beyond float64")
    ranks = [energy_rank(sigma, q) for q in ENERGIES]
    return replace(
        spectrum,
        singular_values=values if math.isfinite(values[0]) else (),
        frobenius_norm=_finite(frobenius * unit),
        spectral_norm=_finite(first * unit),
        condition=first / last if last > resolved * first else None,
        stable_rank=(frobenius / first) ** 2,
        effective_rank=math.exp(float(torch.special.entr(share).sum())),
        numerical_rank=rank,
        energy_ranks=tuple((rank, rank) for rank in ranks),
        notes=tuple(notes),
    )


def _clipped_top(tall: Float[Tensor, "m n"], entries: Entries, scale: float) -> float | None:
    """Return σ₁ of the scaled matrix with its extreme entries clipped; `None` where no entry is extreme."""
    level = entries.clipping_level
    if level is None:
        return None
    return largest_singular_value(clipped(tall, level * scale, scale))


def _singular_values(tall: Float[Tensor, "m n"], scale: float) -> tuple[Float[Tensor, " n"], str]:
    """Return the singular values of `scale · tall` in float64, largest first, and the method."""
    n = tall.shape[1]
    gram = torch.zeros(n, n, dtype=torch.float64, device=tall.device)
    for part in slices(tall, at_least=min(n, 1024)):
        _add_lower_gram(gram, part.to(torch.float64) * scale)
    sigma = torch.linalg.eigvalsh(gram).clamp_min_(0.0).sqrt_().flip(0)
    below = int((sigma < GRAM_FLOOR * sigma[0]).sum())
    if not below:
        return sigma, "gram"
    del gram
    r = torch.zeros(0, n, dtype=torch.float64, device=tall.device)
    for part in slices(tall, at_least=n):
        r = torch.linalg.qr(torch.cat((r, part.to(torch.float64) * scale)), mode="r").R
    small = _smallest(r, below, float(sigma[0])) if below <= FEW * n else None
    if small is None:
        return torch.linalg.svdvals(r), "qr"
    return torch.cat((sigma[:-below], small)).sort(descending=True).values, "gram+inverse"


def _add_lower_gram(gram: Float[Tensor, "n n"], part: Float[Tensor, "k n"]) -> None:
    """Add the lower triangle of partᵀ part, in blocks of columns: about half the work of the full product."""
    n = gram.shape[0]
    width = max(COLUMNS, n // 8)
    for j in range(0, n, width):
        gram[j:, j : j + width].addmm_(part[:, j:].mT, part[:, j : j + width])


def _smallest(r: Float[Tensor, "n n"], count: int, first: float) -> Float[Tensor, " count"] | None:
    """Return the smallest singular values of a triangular matrix, largest first, by subspace inverse iteration.

    `None` where they do not converge to a relative 1e-8 plus float64's rounding of the largest, `first`, or where R is
    singular in float64.
    """
    n = r.shape[0]
    if float(r.diagonal().abs().min()) <= n * torch.finfo(torch.float64).eps * float(r.diagonal().abs().max()):
        return None
    width = min(n, 2 * count + 8)
    generator = torch.Generator(r.device).manual_seed(0)
    basis = torch.randn(n, width, dtype=r.dtype, device=r.device, generator=generator)
    known = torch.full((count,), math.inf, dtype=r.dtype, device=r.device)
    for _ in range(40):
        basis = torch.linalg.solve_triangular(r.mT, torch.linalg.qr(basis).Q, upper=False)
        basis = torch.linalg.solve_triangular(r, torch.linalg.qr(basis).Q, upper=True)
        values = torch.linalg.svdvals(r @ torch.linalg.qr(basis).Q)[-count:]
        if not values.isfinite().all():
            return None
        if bool(((values - known).abs() <= 1e-8 * values + 2 * EPS * first).all()):
            return values
        known = values
    return None


def slices(tall: Float[Tensor, "m n"], at_least: int = 1) -> Iterator[Float[Tensor, "part n"]]:
    """Yield a tall matrix in slices of about `SLICE` elements, each of at least `at_least` rows."""
    if tall.numel():
        yield from tall.split(max(SLICE // tall.shape[1], at_least))


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
