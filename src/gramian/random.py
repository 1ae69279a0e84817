"""Random matrices of known distribution, from a generator that the caller holds.

Nothing here draws from torch's global generator, so the same seed gives the same matrices whatever else runs.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from gramian.errors import DtypeError, InputError, ShapeError

__all__ = ["normal", "orthogonal", "uniform", "wishart", "with_spectrum"]

Device = torch.device | str | None
Real = float | int


def _check(
    name: str,
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    *,
    real: bool = False,
) -> None:
    """Raise without a generator, or for sizes or a dtype that do not fit."""
    if not isinstance(generator, torch.Generator):
        raise InputError(
            f"{name}: expected generator=torch.Generator, got {generator!r}. "
            "Pass torch.Generator().manual_seed(0); nothing here draws from the global generator."
        )
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ShapeError(f"{name}: expected integers ≥ 0, got {shape}. Write {name}(2, 3), not {name}((2, 3)).")
    if dtype is not None and not dtype.is_floating_point and (real or not dtype.is_complex):
        kind = "a real floating dtype" if real else "a floating dtype, real or complex"
        raise DtypeError(f"{name}: expected {kind}, got {dtype}. Use torch.float32.")


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The last two sizes."""
    if len(shape) < 2:
        raise ShapeError(f"{name}: expected (..., m, n), got {shape}. Give at least two sizes, as in {name}(2, 3).")
    return shape[-2], shape[-1]


def _draw_normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype | None) -> Tensor:
    """Standard normal numbers in float64, or complex ones with E|z|² = 1, drawn on the generator's own device."""
    wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float64)
    return torch.randn(shape, generator=generator, dtype=wide, device=generator.device)


def _place(x: Tensor, dtype: torch.dtype | None, device: Device) -> Tensor:
    return x.to(dtype=dtype or torch.get_default_dtype(), device=device or x.device)


def uniform(
    *shape: int,
    low: Real = 0.0,
    high: Real = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Float[Tensor, ...]:
    """Independent entries, uniform on [low, high).

    Args:
        shape: any sizes, as separate integers.
        low, high: the ends of the interval.
        generator: required; the entries are drawn on its device.
        dtype: torch's default if None.
        device: where the result goes; the generator's device if None.
    Returns: a tensor of that shape.
    Raises:
        InputError: without a generator, or with low > high.
        ShapeError: where a size is not an integer ≥ 0.
        DtypeError: where `dtype` is not real floating point.
    Cost: one float64 draw.
    Source: the definition.

    >>> uniform(2, 3, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    _check("uniform", shape, generator, dtype, real=True)
    assert generator is not None
    if not low <= high:
        raise InputError(f"uniform: expected low ≤ high, got {low} and {high}.")
    u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    x = low + (high - low) * u
    wanted = dtype or torch.get_default_dtype()
    below = _below(high, wanted)
    # Rounding to a narrow type would reach the upper end.
    return _place(x.clamp_max(below) if below >= low else x, dtype, device)


def _below(high: Real, dtype: torch.dtype) -> float:
    """The largest number of `dtype` below `high`."""
    top = torch.tensor(high, dtype=torch.float64, device="cpu").to(dtype)
    if float(top) < high:
        return float(top)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    if float(top) == 0:
        return -torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # The patterns of floating-point numbers are ordered by magnitude.
    return float((top.view(bits) + (-1 if float(top) > 0 else 1)).view(dtype))


def normal(
    *shape: int,
    mean: Real = 0.0,
    std: Real = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Inexact[Tensor, ...]:
    """Independent entries, normal with the given mean and standard deviation.

    Those of a complex dtype are circular: real and imaginary part are independent, each with variance std²/2.

    Args:
        shape: any sizes, as separate integers.
        mean, std: of each entry.
        generator: required; the entries are drawn on its device.
        dtype: torch's default if None.
        device: where the result goes; the generator's device if None.
    Returns: a tensor of that shape.
    Raises:
        InputError: without a generator, or with std < 0.
        ShapeError: where a size is not an integer ≥ 0.
        DtypeError: where `dtype` is not floating point, real or complex.
    Cost: one float64 draw.
    Source: the definition.

    >>> normal(2, 3, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    _check("normal", shape, generator, dtype)
    assert generator is not None
    if not std >= 0:
        raise InputError(f"normal: expected std ≥ 0, got {std}.")
    return _place(mean + std * _draw_normal(shape, generator, dtype), dtype, device)


def _haar(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype | None) -> Tensor:
    """Haar-distributed orthonormal columns or rows, in float64 or complex128."""
    m, n = shape[-2:]
    gaussian = _draw_normal((*shape[:-2], max(m, n), min(m, n)), generator, dtype)
    q, r = torch.linalg.qr(gaussian)
    # LAPACK chooses the signs of R's diagonal, or its phases. Q is Haar only if all are positive: it then commutes with
    # rotations of the Gaussian matrix.
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    q = q * torch.where(diagonal == 0, 1.0, diagonal.sgn())[..., None, :]
    return q if m >= n else q.mT


def orthogonal(
    *shape: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Inexact[Tensor, "*b m n"]:
    """Matrices with orthonormal columns (m ≥ n) or rows (m < n), distributed by Haar measure.

    Q of the QR factorization of a Gaussian matrix in which the diagonal of R is positive; unitary for a complex dtype.

    Args:
        shape: ..., m, n, as separate integers.
        generator: required; the entries are drawn on its device.
        dtype: torch's default if None.
        device: where the result goes; the generator's device if None.
    Returns: `(..., m, n)`.
    Raises:
        InputError: without a generator.
        ShapeError: for fewer than two sizes, or a size that is not an integer ≥ 0.
        DtypeError: where `dtype` is not floating point, real or complex.
    Cost: one float64 QR.
    Source: Mezzadri, Notices of the AMS 54 (2007), §5; Stewart, SIAM J. Numer. Anal. 17 (1980).

    >>> q = orthogonal(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> torch.allclose(q.mT @ q, torch.eye(2, dtype=torch.float64))
    True
    """
    _check("orthogonal", shape, generator, dtype)
    _matrix("orthogonal", shape)
    assert generator is not None
    return _place(_haar(shape, generator, dtype), dtype, device)


def with_spectrum(
    *shape: int,
    spectrum: Float[Tensor, "*s k"],
    symmetric: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Inexact[Tensor, "*b m n"]:
    """Matrices with the given singular values, or eigenvalues, and Haar-distributed singular vectors.

    U diag(spectrum) Vᵀ; if symmetric, U diag(spectrum) Uᵀ, whose eigenvalues are the spectrum. For a complex dtype
    U and V are unitary, ᵀ is the adjoint, and symmetric means Hermitian.

    Args:
        shape: ..., m, n, as separate integers.
        spectrum: `(..., min(m, n))`, broadcast over the batch.
        symmetric: whether the spectrum is that of eigenvalues of symmetric matrices.
        generator: required; the entries are drawn on its device.
        dtype: torch's default if None.
        device: where the result goes; the generator's device if None.
    Returns: `(..., m, n)`.
    Raises:
        InputError: without a generator.
        ShapeError: for fewer than two sizes, a symmetric matrix that is not square, or a spectrum that does not fit.
        DtypeError: where `dtype` is not floating point, real or complex.
    Cost: two float64 QRs, one if symmetric. Accuracy: the spectrum is right to one rounding of the dtype, relative to
    its largest value.
    Source: Higham, Accuracy and Stability (2002), §28.3.

    >>> g = torch.Generator().manual_seed(0)
    >>> m = with_spectrum(2, 2, spectrum=torch.tensor([3.0, 1.0]), symmetric=True, generator=g)
    >>> torch.linalg.eigvalsh(m)
    tensor([1.0000, 3.0000])
    """
    _check("with_spectrum", shape, generator, dtype)
    m, n = _matrix("with_spectrum", shape)
    assert generator is not None
    k = min(m, n)
    if symmetric and m != n:
        raise ShapeError(f"with_spectrum: symmetric matrices are square, got {shape}.")
    if not isinstance(spectrum, Tensor) or spectrum.ndim < 1 or spectrum.shape[-1] != k:
        came = tuple(spectrum.shape) if isinstance(spectrum, Tensor) else type(spectrum).__name__
        raise ShapeError(f"with_spectrum: expected spectrum of shape (..., {k}) for {shape}, got {came}.")
    try:
        values = spectrum.to(dtype=torch.float64, device=generator.device).expand(*shape[:-2], k)
    except RuntimeError as e:
        raise ShapeError(
            f"with_spectrum: spectrum {tuple(spectrum.shape)} does not broadcast to {(*shape[:-2], k)}."
        ) from e
    u = _haar((*shape[:-2], m, k), generator, dtype)
    if symmetric:
        product = (u * values[..., None, :]) @ u.mH
        return _place((product + product.mH) / 2, dtype, device)
    v = _haar((*shape[:-2], n, k), generator, dtype)
    return _place((u * values[..., None, :]) @ v.mH, dtype, device)


def wishart(
    *shape: int,
    samples: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Inexact[Tensor, "*b d d"]:
    """Second moments XᵀX / n of n standard normal samples X (n, d).

    Xᴴ X / n for a complex dtype. Its eigenvalues follow the Marchenko–Pastur law of ratio d/n; for n < d it is
    singular, of rank n.

    Args:
        shape: ..., d, d, as separate integers.
        samples: n ≥ 1.
        generator: required; the entries are drawn on its device.
        dtype: torch's default if None.
        device: where the result goes; the generator's device if None.
    Returns: `(..., d, d)`.
    Raises:
        InputError: without a generator, or where `samples` is not an integer ≥ 1.
        ShapeError: where the last two sizes are missing or differ.
        DtypeError: where `dtype` is not floating point, real or complex.
    Cost: one float64 product.
    Source: Marchenko and Pastur, Math. USSR Sbornik 1 (1967).

    >>> wishart(2, 2, samples=5, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 2])
    """
    _check("wishart", shape, generator, dtype)
    m, n = _matrix("wishart", shape)
    assert generator is not None
    if m != n:
        raise ShapeError(f"wishart: expected square (..., d, d), got {shape}.")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise InputError(f"wishart: expected samples ≥ 1, got {samples!r}.")
    x = _draw_normal((*shape[:-2], samples, n), generator, dtype) / math.sqrt(samples)
    gram = x.mH @ x
    lower = gram.tril(-1)
    return _place(torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1).real) + lower + lower.mH, dtype, device)
