"""LAPACK's factorizations, where one failure never raises for the batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gramian.linalg.engine.scaling import exponent_of, scale

LinAlgError: type[RuntimeError] = getattr(torch.linalg, "LinAlgError")  # noqa: B009  torch's stub does not declare it


def _each(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """`function` of the batch; if that raises, of each matrix by itself, with the identity's factors where it fails."""
    ok = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    try:
        return function(x), ok
    except LinAlgError:
        pass
    parts: list[tuple[Tensor, ...]] = []
    for i, matrix in enumerate(x):
        try:
            parts.append(function(matrix))
        except LinAlgError:
            ok[i] = False
            parts.append(function(torch.eye(*matrix.shape, dtype=x.dtype, device=x.device)))
    return tuple(torch.stack(column) for column in zip(*parts, strict=True)), ok


def eigh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (B, n) ascending, eigenvectors (B, n, n), and for which matrices LAPACK converged (B,)."""
    (w, v), ok = _each(lambda y: tuple(torch.linalg.eigh(y)), x)
    return w, v, ok


def small_eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n) ascending and eigenvectors of small symmetric matrices (..., n, n).

    They are NaN where an entry is not finite or LAPACK fails: what they are for then proves nothing, and says so.
    """
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    w, v, ok = eigh(torch.where(finite, x, eye).reshape(-1, *x.shape[-2:]))
    good = finite & ok.reshape(finite.shape)
    return (
        torch.where(good[..., 0], w.reshape(x.shape[:-1]), math.nan),
        torch.where(good, v.reshape(x.shape), math.nan),
    )


def small_eigvalsh(x: Tensor) -> Tensor:
    """The eigenvalues of `small_eigh`."""
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    w, ok = eigvalsh(torch.where(finite, x, eye).reshape(-1, *x.shape[-2:]))
    return torch.where(finite[..., 0] & ok.reshape(finite.shape)[..., 0], w.reshape(x.shape[:-1]), math.nan)


def eig(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Complex eigenvalues (B, n), eigenvectors (B, n, n), and for which float64 matrices LAPACK converged (B,)."""
    y, exponent = _near_one(x)
    (w, v), ok = _each(lambda y: tuple(torch.linalg.eig(y)), y)
    return _restored(w, exponent), v, ok


def eigvals(x: Tensor) -> tuple[Tensor, Tensor]:
    """Complex eigenvalues (B, n) of any float64 matrices, and for which LAPACK converged (B,)."""
    y, exponent = _near_one(x)
    (w,), ok = _each(lambda y: (torch.linalg.eigvals(y),), y)
    return _restored(w, exponent), ok


def _near_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices with a largest entry near 1, and the powers of two that restore them.

    MKL's `geev` scales entries below 1e-138 itself, and then fails to converge on some singular matrices (x xᵀ of
    side 7 at 1e-150) and writes beyond its memory, which ends the process.
    """
    exponent = exponent_of(x)
    return scale(x, -exponent), exponent


def _restored(w: Tensor, exponent: Tensor) -> Tensor:
    return torch.view_as_complex(scale(torch.view_as_real(w), exponent).contiguous())


def eigvalsh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, n) ascending, and for which matrices LAPACK converged (B,)."""
    (w,), ok = _each(lambda y: (torch.linalg.eigvalsh(y),), x)
    return w, ok


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U (B, m, k), singular values (B, k) descending, V (B, n, k), and for which matrices LAPACK converged (B,)."""
    (u, s, vh), ok = _each(lambda y: tuple(torch.linalg.svd(y, full_matrices=False)), x)
    return u, s, vh.mT, ok


BLOCKED_FROM = 512
"""Rows from which a Cholesky factor is found in strips on a CPU. MKL's own takes 1.2 float32 products at 1024 on a Xeon
with AMX, a third of which is a pass that zeroes a triangle; the strips take half, and in float64 two thirds."""

STRIP = 128
"""Rows of such a strip; 64 and 256 took as long, or longer."""


def cholesky(x: Tensor, upper: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of (B, n, n), perhaps stored by columns, and LAPACK's info (B,), 0 where it succeeded.

    Where it failed the factor has no meaning. They may be put into the upper triangles of `upper` (B, n, n), which
    spares a pass if the other ones do not matter.
    """
    if x.device.type != "cpu" or x.shape[-1] < BLOCKED_FROM:
        factor, info = torch.linalg.cholesky_ex(x)
        return factor, info
    info = torch.zeros(x.shape[0], dtype=torch.int32, device="cpu")
    upper = torch.zeros_like(x, memory_format=torch.contiguous_format) if upper is None else upper
    for i, (matrix, u) in enumerate(zip(x, upper, strict=True)):
        info[i] = _in_strips(matrix, u)
    return upper.mT, info


def _in_strips(x: Tensor, u: Tensor) -> int:
    """Fills the upper triangle of `u` with U, UᵀU = x, strip by strip; returns the first minor that is not positive."""
    n = len(x)
    for start in range(0, n, STRIP):
        stop = min(start + STRIP, n)
        own, right = u[start:stop, start:stop], u[start:stop, stop:]
        strip = x[start:stop, start:]
        if start:
            strip = torch.addmm(strip, u[:start, start:stop].mT, u[:start, start:], alpha=-1)
        factor, info = torch.linalg.cholesky_ex(strip[:, : stop - start], upper=True)
        if int(info):
            return start + int(info)
        own.copy_(factor)
        if stop < n:
            right.copy_(torch.linalg.solve_triangular(factor.mT, strip[:, stop - start :], upper=False))
    return 0


BATCHED_LU = 128
"""Largest n for which torch's batched LU on a CPU is right."""


def inverse(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse by LU of each matrix of (B, n, n), and LAPACK's info (B,), 0 where it succeeded.

    On two threads or more torch 2.13 with MKL factors a batch in parallel with wrong pivots (n = 200 and up: "Parameter
    6 was incorrect on entry to DLASWP", then a RuntimeError), so larger matrices are inverted one by one.
    """
    if x.device.type != "cpu" or x.shape[0] < 2 or x.shape[-1] <= BATCHED_LU:
        value, info = torch.linalg.inv_ex(x)
        return value, info
    parts = [torch.linalg.inv_ex(matrix) for matrix in x]
    return torch.stack([value for value, _ in parts]), torch.stack([info for _, info in parts])
