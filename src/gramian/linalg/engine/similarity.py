"""Functions of matrices far from normal, in a basis in which they are near normal.

f(A) = W f(B) W⁻¹ with B = W⁻¹AW, for a real W of approximate eigenvectors. With Y ≈ W⁻¹ and R = I − WY,
W⁻¹ = Y(I − R)⁻¹. All products are in double-double arithmetic, whose roundings are magnified by κ(W).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg.engine import lapack
from gramian.linalg.engine.double_double import Pair, eye_like, fine_product, minus, pair, plus, product
from gramian.linalg.engine.exponential import two_norm
from gramian.linalg.engine.rounding import norm
from gramian.linalg.engine.scaling import scale

CORRECTIONS = 4
"""Steps of Y ← Y + Y(I − WY): each gains the digits that float64 leaves at κ(W)."""


SWEEPS, BALANCED = 20, 64
"""Rounds over the rows by which a matrix is balanced, and the largest side for which that is done."""


class Similar(NamedTuple):
    """B with the error of what was computed, W and Y ≈ W⁻¹, and ‖R‖/(1 − ‖R‖)."""

    b: Pair
    basis: Pair
    back: Pair
    share: Tensor

    def restored(self, value: Pair, error: Tensor) -> tuple[Pair, Tensor]:
        """W f(B) W⁻¹, and its error, from f(B) up to an error."""
        out = product(product(self.basis, value._replace(error=torch.zeros_like(error))), self.back)
        inner = error + self.share * (norm(value.hi) + norm(value.lo) + error)
        return out, spectral_bound(self.basis) * inner * spectral_bound(self.back) + out.error


def similar(a: Pair, refinements: int = 0, *, useless: float = math.inf) -> Similar:
    """The similar matrix of an exact pair (B, n, n), in a basis of eigenvectors refined so many times.

    One of float64 leaves u‖A‖κ(W) beside the eigenvalues, and each refinement about the square of that. Where κ(W) is
    `useless`, as for a defective matrix, it is the matrix itself.
    """
    eye = torch.eye(a.hi.shape[-1], dtype=a.hi.dtype, device=a.hi.device)
    finite = a.hi.isfinite().flatten(1).all(1)
    values, vectors, _ = lapack.eig(torch.where(finite[:, None, None], a.hi, eye))
    # Of a pair of complex eigenvectors the real and the imaginary part.
    w = torch.where(values.imag[:, None, :] < 0, vectors.imag, vectors.real)
    s = _in_basis(a, pair(w), useless)
    for _ in range(refinements):
        s = _in_basis(a, plus(s.basis, s.basis.hi @ _turn(s.b, values)), useless)
    return s


def _in_basis(a: Pair, basis: Pair, useless: float) -> Similar:
    """The similar matrix in this basis, or A itself where the basis has no inverse that is of use."""
    eye = torch.eye(a.hi.shape[-1], dtype=a.hi.dtype, device=a.hi.device)
    y, info = lapack.inverse(basis.hi)
    bad = ((info != 0) | ~(norm(basis.hi) * norm(y) < useless))[:, None, None]
    basis = basis._replace(hi=torch.where(bad, eye, basis.hi), lo=torch.where(bad, 0.0, basis.lo))
    back = pair(torch.where(bad, eye, y))
    y = back.hi
    for _ in range(CORRECTIONS):
        gap, _ = minus(eye_like(y), fine_product(basis, back))
        back = plus(back, y @ torch.where((norm(gap) < 1)[:, None, None], gap, 0.0))
    gap, gap_error = minus(eye_like(y), fine_product(basis, back))
    size = norm(gap) + gap_error
    share = torch.where(size < 0.5, size / (1 - size), math.inf)
    inner = fine_product(a, basis)
    b = fine_product(back, inner)
    lost = inner.error + share * (norm(inner.hi) + norm(inner.lo) + inner.error)
    return Similar(b._replace(error=b.error + spectral_bound(back) * lost), basis, back, share)


def balance(x: Tensor) -> Tensor:
    """Exponents e (B, n) for which 2^(eⱼ − eᵢ) xᵢⱼ has rows and columns of like size off its diagonal, above 1.

    Osborne (1960), with a floor of 1 where LAPACK's `gebal` would permute: the part of a triangular matrix above its
    diagonal is scaled down to that, and no further. 0 beyond a side of `BALANCED`.
    """
    n = x.shape[-1]
    e = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
    if n > BALANCED:
        return e
    off = x - torch.diag_embed(x.diagonal(dim1=-2, dim2=-1))
    for _ in range(SWEEPS):
        before = e.clone()
        for i in range(n):
            row = scale(off[:, i], e - e[:, i : i + 1]).norm(dim=-1).clamp_min(1.0)
            column = scale(off[:, :, i], e[:, i : i + 1] - e).norm(dim=-1).clamp_min(1.0)
            e[:, i] += ((row / column).log2() / 2).nan_to_num(posinf=0.0, neginf=0.0).round().long().clamp(-400, 400)
        e = (e - e.amin(-1, keepdim=True)).clamp(max=400)
        if torch.equal(e, before):
            break
    return e


def _turn(b: Pair, values: Tensor) -> Tensor:
    """Y such that (I + Y)⁻¹B(I + Y) is diagonal to first order, with blocks [[p, −q], [q, p]] for complex eigenvalues.

    Where two eigenvalues are nearer than ten times what is between them, that is left.
    """
    n, pair_of = b.hi.shape[-1], values.imag
    eye = torch.eye(n, dtype=b.hi.dtype, device=b.hi.device)
    # A quarter turn of each pair, which LAPACK puts side by side, with the positive imaginary part first.
    below = torch.diag_embed((pair_of > 0)[:, :-1].to(eye.dtype), -1)
    above = torch.diag_embed((pair_of < 0)[:, 1:].to(eye.dtype), 1)
    quarter = torch.where((pair_of == 0)[:, None, :], eye, 0.0) + below - above
    inside = (quarter != 0) | (eye == 1)
    blocks = torch.where(inside, (b.hi + quarter @ b.hi @ quarter.mT) / 2, 0.0)
    rest = ((b.hi - blocks) + b.lo).to(values.dtype)
    # Their eigenvectors (1, ∓i)/√2 make the blocks diagonal.
    unitary = math.sqrt(0.5) * (torch.where(pair_of < 0, 1j, 1.0)[:, None, :] * eye + above - 1j * below)
    unitary = torch.where((pair_of == 0)[:, None, :], eye.to(values.dtype), unitary)
    diagonal = (unitary.mH @ blocks.to(values.dtype) @ unitary).diagonal(dim1=-2, dim2=-1)
    gaps = diagonal[:, None, :] - diagonal[:, :, None]
    c = unitary.mH @ rest @ unitary
    apart = c.abs() < 0.1 * gaps.abs()
    y = torch.where(apart, c / torch.where(apart, gaps, 1.0), 0.0)
    return (unitary @ y @ unitary.mH).real


def spectral_bound(x: Pair) -> Tensor:
    """A bound on ‖X‖₂."""
    size = norm(x.hi).clamp_min(2.0**-1000)
    return two_norm(x.hi / size[:, None, None]) * size + norm(x.lo)
