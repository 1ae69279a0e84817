"""Symmetric products at about half the work, in strips."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gramian.linalg.engine.transforms import grads_batched
from gramian.linalg.engine.workspace import scratch

HALVED_FROM = 256
"""Rows and columns from which the halved product wins on a CPU: 0.8 of the time at 256, 0.7 at 384×1536, 0.6 at
2048."""

PARTS = 4, 8
"""Numbers of strips, below 768 rows and from there on. The work is (1 + 1/strips)/2, and each strip's product has to be
large enough to be fast: of 3, 4, 6, 8 strips and of recursive halves these were fastest with MKL on one thread, at 384
to 2048 rows."""


ROWS = 512
"""Rows that are multiplied at once, and widened: what they take stays in the cache. A Gram matrix of 4096 rows takes
0.7 to 0.8 of the time that it takes with all at once, one of 1024 rows 0.8."""


def halved(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Fills `out` (n, n) with x y, for x (n, k) and y (k, n) whose exact product is symmetric.

    It computes each strip from the diagonal to the right and mirrors the rest, so that the result is exactly symmetric.
    """
    for start, stop in _strips(len(x)):
        if x.dtype == out.dtype:
            torch.mm(x[start:stop], y[:, start:], out=out[start:stop, start:])
        else:
            out[start:stop, start:].copy_(x[start:stop] @ y[:, start:])
    _mirror(out)


def _strips(n: int) -> list[tuple[int, int]]:
    width = max(-(-n // PARTS[n >= 768]), 1)
    return [(start, min(start + width, n)) for start in range(0, n, width)]


CACHED = 4 << 20
"""Bytes of a matrix up to which it is mirrored as a whole: two passes more, but torch transposes by blocks then."""


def _mirror(out: Tensor) -> None:
    """Makes `out` (n, n) symmetric, from what is in its strips."""
    if out.is_contiguous() and out.numel() * out.itemsize <= CACHED:
        out.triu_().diagonal().div_(2)
        out.add_(scratch("mirrored", tuple(out.shape), out.dtype, out).copy_(out.mT))
        return
    for start, stop in _strips(len(out)):
        own = out[start:stop, start:stop]
        own.copy_(own.triu() + own.triu(1).mT)  # a general product may round (i, j) and (j, i) differently
        out[stop:, start:stop].copy_(out[start:stop, stop:].mT)


def _halved_gram(x: Tensor, out: Tensor) -> None:
    """Fills `out` (n, n) with xᵀx, in its dtype."""
    m, n = x.shape
    by_columns = x.stride(0) == 1
    for first in range(0, m, ROWS):
        part = x[first : first + ROWS]
        if x.dtype != out.dtype:
            shape = tuple(part.mT.shape if by_columns else part.shape)
            wide = scratch("part", shape, out.dtype, x)
            part = (wide.mT if by_columns else wide).copy_(part)
        for start, stop in _strips(n):
            own = out[start:stop, start:]
            left, right = part[:, start:stop].mT, part[:, start:]
            if first:
                torch.addmm(own, left, right, out=own)
            else:
                torch.mm(left, right, out=own)
    _mirror(out)


def symmetric_product(x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x y (..., n, n) in `dtype`, exactly symmetric, for x (..., n, k) and y (..., k, n) with a symmetric product.

    On a CPU, from 256 rows and columns, it takes 5/8 to 9/16 of the work, unless a gradient is recorded or x is a
    tensor subclass.
    """
    dtype = dtype or x.dtype
    if not halves(x, y):
        product = (x @ y).to(dtype)
        return product.tril() + product.tril(-1).mT
    x, y = x.detach(), y.detach()
    out = x.new_empty(*x.shape[:-1], x.shape[-2], dtype=dtype)
    for left, right, whole in zip(_flat(x), _flat(y), _flat(out), strict=True):
        halved(left, right, whole)
    return out


def changed_in_basis(v: Tensor, e: Tensor, change: Callable[[Tensor, int, slice], None]) -> Tensor:
    """V C Vᵀ (..., n, n), exactly symmetric, for the symmetric C that `change` makes of VᵀEV, E symmetric.

    It makes it of one strip at once, from the diagonal to the right, in place: `change(strip, i, rows)` of matrix i of
    the batch. With the strips alone, C = S + Sᵀ, it is VSVᵀ + (VSVᵀ)ᵀ, which takes 3¼ products in place of four.
    """
    out = torch.empty_like(e, memory_format=torch.contiguous_format)
    image, upper = (scratch(f"in basis: {name}", tuple(e.shape[-2:]), e.dtype, e) for name in ("image", "upper"))
    for i, (basis, matrix, whole) in enumerate(zip(_flat(v), _flat(e), _flat(out), strict=True)):
        torch.mm(matrix, basis, out=image)
        for start, stop in _strips(len(whole)):
            strip = upper[start:stop, start:]
            torch.mm(basis[:, start:stop].mT, image[:, start:], out=strip)
            change(strip, i, slice(start, stop))
            strip[:, : stop - start].triu_().diagonal().div_(2)
        for start, stop in _strips(len(whole)):
            torch.mm(basis[:, :stop], upper[:stop, start:stop], out=image[:, start:stop])
        torch.mm(image, basis.mT, out=upper)
        whole.copy_(upper.mT).add_(upper)  # a sum with a transpose takes twice as long
    return out


def with_transpose(x: Tensor, sign: int = 1) -> Tensor:
    """x + sign · xᵀ, for a square matrix x in half of the time of the plain sum: torch copies a transpose by blocks."""
    if x.ndim > 2:
        return x + x.mT if sign == 1 else x - x.mT
    turned = x.mT.clone(memory_format=torch.contiguous_format)
    return (turned if sign == 1 else turned.neg_()).add_(x)


def halves(x: Tensor, y: Tensor) -> bool:
    """Whether the work can be halved, and is so large that it pays."""
    return min(x.shape[-2:]) >= HALVED_FROM and x.device.type == "cpu" and _plain(x) and _plain(y)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def _plain(x: Tensor) -> bool:
    """Whether x is an ordinary tensor, one and not several gradients at once, whose gradient nobody records."""
    recorded = x.requires_grad and torch.is_grad_enabled()
    return not recorded and not grads_batched(x) and (type(x) is Tensor or isinstance(x, torch.nn.Parameter))


def gram(x: Tensor, work: torch.dtype | None = None) -> Tensor:
    """xᵀx (B, n, n) in `work`, exactly symmetric; x is widened a few rows at once.

    On a CPU, from 256 rows and columns, it takes 5/8 to 9/16 of the work, as `symmetric_product` does.
    """
    work = work or x.dtype
    if halves(x, x):
        x = x.detach()
        out = x.new_empty(*x.shape[:-2], x.shape[-1], x.shape[-1], dtype=work)
        for matrix, whole in zip(_flat(x), _flat(out), strict=True):
            _halved_gram(matrix, whole)
        return out
    if x.dtype == work or x.shape[-2] <= 4 * x.shape[-1]:
        wide = x.to(work)
        return symmetric_product(wide.mT, wide)
    total = None
    for part in x.split(max(4 * x.shape[-1], HALVED_FROM), dim=-2):
        wide = part.to(work)
        product = symmetric_product(wide.mT, wide)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total
