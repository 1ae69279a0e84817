"""The numbers of one matrix: its singular values, and what follows from them and from its entries.

One matrix in, plain numbers out. The matrix is read in slices along its longer side, in float64, so that besides the
matrix itself memory holds a few matrices of its smaller side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import DtypeError, ShapeError

__all__ = ["Spectrum", "describe"]

# Below this σ_min/σ_max the Gram matrix loses digits: an eigenvalue is off by some 8 ε₆₄ σ_max², so σ is off by
# 4 ε₆₄ (σ_max/σ)² of itself, which is 1e-6 here. tests/test_spectra.py measures it.
GRAM_FLOOR = 3e-5

SLICE = 1 << 20  # elements read at a time: 8 MB in float64

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Spectrum:
    """The numbers of one matrix. What does not exist or cannot be known is `None`, and `notes` say why.

    `singular_values` come largest first. `overflows` and `underflows` count the finite entries that become infinite,
    and the non-zero ones that become zero, in `"float16"` and `"bfloat16"`. `method` is how the singular values were
    computed: `"gram"` or `"qr"`, or empty where they were not.
    """

    shape: tuple[int, int]
    dtype: str
    singular_values: tuple[float, ...] = ()
    frobenius_norm: float | None = None
    spectral_norm: float | None = None
    condition: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    numerical_rank: int | None = None
    num_nonfinite: int = 0
    num_zeros: int = 0
    overflows: dict[str, int] = field(default_factory=dict)
    underflows: dict[str, int] = field(default_factory=dict)
    method: str = ""
    notes: tuple[str, ...] = ()


@torch.no_grad()
def describe(w: Float[Tensor, "m n"]) -> Spectrum:
    """Return the singular values of a matrix, its norms and ranks, and counts of unusual entries.

        stable rank      ‖W‖_F² / σ₁²
        effective rank   exp(−Σ pᵢ log pᵢ),  pᵢ = σᵢ² / Σ σⱼ²
        numerical rank   the number of σᵢ > max(m, n) ε σ₁
        condition        σ₁ / σ_min

    The effective rank is Roy & Vetterli's with the shares of the energy σ² in place of those of σ, so that
    1 ≤ stable rank ≤ effective rank ≤ rank. For float16 and bfloat16, whose max(m, n) ε soon exceeds 1, the numerical
    rank counts σᵢ above the norm that rounding alone gives, ½ ε (√m + √n) ‖W‖_F / √(mn).

    Args:
        w: a matrix of shape (m, n), float64, float32, float16 or bfloat16, of any scale. NaN, infinities and zeros are
            described, never raised.

    Raises:
        ShapeError: w is not a matrix.
        DtypeError: w is not of a floating dtype above.

    Cost: for m ≥ n, one product m n² and the eigenvalues of an n × n matrix; where σ_min/σ₁ < 3e-5, which the Gram
    matrix cannot resolve, one more pass of QR and the singular values of R. Memory: a few n × n matrices in float64.
    Accuracy: 1e-6 relative for σ > 1e-10 σ₁, and 1e-16 σ₁ below, times a slowly growing function of n.

    Source: Roy & Vetterli, The effective rank (EUSIPCO 2007), eq. 1–3; Golub & Van Loan, Matrix Computations, §5.4.1.

    Example:
        >>> spectrum = describe(torch.diag(torch.tensor([3.0, 4.0])))
        >>> spectrum.singular_values, spectrum.frobenius_norm, round(spectrum.stable_rank, 6)
        ((4.0, 3.0), 5.0, 1.5625)
    """
    if w.ndim != 2:
        raise ShapeError(
            f"describe: expected (m, n), got {tuple(w.shape)}. gramian.blocks says which matrices it holds."
        )
    if w.dtype not in DTYPES:
        raise DtypeError(
            f"describe: expected float64, float32, float16 or bfloat16, got {w.dtype}. Dequantise it first."
        )
    m, n = w.shape
    tall = w.detach() if m >= n else w.detach().mT
    spectrum, largest = _describe_entries(tall)
    spectrum = replace(spectrum, shape=(m, n))
    if spectrum.num_nonfinite:
        return replace(spectrum, notes=(f"{spectrum.num_nonfinite} entries are not finite: no spectrum",))
    if largest == 0.0:
        zeros = (0.0,) * min(m, n)
        what = "no entries" if w.numel() == 0 else "all entries are zero"
        return replace(
            spectrum,
            singular_values=zeros,
            frobenius_norm=0.0,
            spectral_norm=0.0,
            numerical_rank=0,
            notes=(f"{what}: no condition and no share of energy",),
        )
    # a power of two scales exactly; the limits keep the scale itself, and its inverse, in float64's range
    exponent = min(max(math.frexp(largest)[1], -1000), 1000)
    try:
        sigma, method = _singular_values(tall, 2.0**-exponent)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return replace(spectrum, notes=("LAPACK did not converge: no spectrum",))
    return _derive(replace(spectrum, method=method), sigma, w.dtype, 2.0**exponent)


def _derive(spectrum: Spectrum, sigma: Float[Tensor, " k"], dtype: torch.dtype, unit: float) -> Spectrum:
    """Fill in what follows from the singular values, which are given in units of `unit`, largest first."""
    m, n = spectrum.shape
    first, last, frobenius = float(sigma[0]), float(sigma[-1]), float(sigma.square().sum().sqrt())
    share = (sigma / frobenius).square()
    eps = torch.finfo(dtype).eps
    if dtype in NARROW:
        tolerance = eps / 2 * (math.sqrt(m) + math.sqrt(n)) * frobenius / math.sqrt(m * n)
    else:
        tolerance = max(m, n) * eps * first
    # norms may leave float64's range where entries do not
    values = tuple((sigma * unit).tolist())
    notes = []
    resolved = max(m, n) * torch.finfo(torch.float64).eps  # what float64 can tell from zero
    if last <= resolved * first:
        notes.append(f"singular in float64: the condition is above {1 / resolved:.0e} or infinite")
    if not math.isfinite(frobenius * unit):
        notes.append("norms and singular values beyond float64")
    return replace(
        spectrum,
        singular_values=values if math.isfinite(values[0]) else (),
        frobenius_norm=_finite(frobenius * unit),
        spectral_norm=_finite(first * unit),
        condition=first / last if last > resolved * first else None,
        stable_rank=(frobenius / first) ** 2,
        effective_rank=math.exp(float(torch.special.entr(share).sum())),
        numerical_rank=int((sigma > tolerance).sum()),
        notes=tuple(notes),
    )


def _describe_entries(tall: Float[Tensor, "m n"]) -> tuple[Spectrum, float]:
    """Return the counts of entries, and the largest finite magnitude."""
    nonfinite, zeros, largest = 0, 0, 0.0
    overflows, underflows = ({_name(dtype): 0 for dtype in NARROW} for _ in range(2))
    for part in _slices(tall):
        finite = part.isfinite()
        nonfinite += part.numel() - int(finite.sum())
        zeros += int((part == 0).sum())
        part = part.where(finite, 0)
        largest = max(largest, float(part.abs().max()))
        for dtype in NARROW:
            cast = part.to(dtype)
            overflows[_name(dtype)] += int(cast.isinf().sum())
            underflows[_name(dtype)] += int(((cast == 0) & (part != 0)).sum())
    shape = (tall.shape[0], tall.shape[1])
    counts = Spectrum(shape, _name(tall.dtype), num_nonfinite=nonfinite, num_zeros=zeros)
    return replace(counts, overflows=overflows, underflows=underflows), largest


def _singular_values(tall: Float[Tensor, "m n"], scale: float) -> tuple[Float[Tensor, " n"], str]:
    """Return the singular values of `scale · tall` in float64, largest first, and the method."""
    n = tall.shape[1]
    gram = torch.zeros(n, n, dtype=torch.float64, device=tall.device)
    for part in _slices(tall):
        part = part.to(torch.float64) * scale
        gram.addmm_(part.mT, part)
    sigma = torch.linalg.eigvalsh(gram).clamp_min_(0.0).sqrt_().flip(0)
    if float(sigma[-1]) >= GRAM_FLOOR * float(sigma[0]):
        return sigma, "gram"
    del gram
    r = torch.zeros(0, n, dtype=torch.float64, device=tall.device)
    for part in _slices(tall, at_least=n):
        r = torch.linalg.qr(torch.cat((r, part.to(torch.float64) * scale)), mode="r").R
    return torch.linalg.svdvals(r), "qr"


def _slices(tall: Float[Tensor, "m n"], at_least: int = 1) -> Iterator[Float[Tensor, "part n"]]:
    if tall.numel():
        yield from tall.split(max(SLICE // tall.shape[1], at_least))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
