"""Symmetric products at about half the work, by halves and quarters in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 256
"""Rows below which a product is too small to be worth splitting."""


def symmetric_product(x: Tensor, y: Tensor) -> Tensor:
    """x y (B, n, n), exactly symmetric, for x (B, n, k) and y (B, k, n) whose product is symmetric but for rounding.

    The lower triangle is computed by halving n at most twice, the upper one copied from it: (1/2 + 1/8) of the
    work.
    """
    n = x.shape[-2]
    out = x.new_empty(*x.shape[:-1], n)
    _fill(x, y, out, max(LEAF, n // 4))
    return out


def _fill(x: Tensor, y: Tensor, out: Tensor, leaf: int) -> None:
    n = out.shape[-1]
    if n <= leaf or out.device.type != "cpu":
        product = x @ y
        out.copy_(product.tril() + product.tril(-1).mT)
        return
    h = n // 2
    _fill(x[..., :h, :], y[..., :h], out[..., :h, :h], leaf)
    _fill(x[..., h:, :], y[..., h:], out[..., h:, h:], leaf)
    torch.matmul(x[..., h:, :], y[..., :h], out=(below := out.new_empty(*out.shape[:-2], n - h, h)))
    out[..., h:, :h] = below
    out[..., :h, h:] = below.mT


def gram(x: Tensor, work: torch.dtype | None = None) -> Tensor:
    """xᵀx in `work`, exactly symmetric, x being widened a few rows at a time (B, n, n)."""
    if work is None or x.dtype == work or x.shape[-2] <= 4 * x.shape[-1]:
        wide = x if work is None else x.to(work)
        return symmetric_product(wide.mT, wide)
    total = None
    for part in x.split(max(4 * x.shape[-1], LEAF), dim=-2):
        wide = part.to(work)
        product = symmetric_product(wide.mT, wide)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total
