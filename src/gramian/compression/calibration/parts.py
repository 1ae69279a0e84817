"""Fused parts: matrices in one parameter, as queries, keys and values, of which each has a second moment of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gramian.block import Block
from gramian.compression.calibration.experts import rows_of_parts
from gramian.compression.calibration.shrinkage import Roots, roots
from gramian.gram import DiagonalGram, Gram
from gramian.layers import layout_of

__all__ = ["output_roots", "parts_of", "parts_of_roots"]


def output_roots(
    block: Block | None, g: Gram | DiagonalGram, rows: float, layer: nn.Module, entry: int | None = None
) -> Roots:
    """Roots of G over the layer's outputs; of fused parts, which have a G each, along the diagonal.

    Args:
        block: of the layer's weight; `None` for a factored layer.
        g: of the outputs.
        rows: as in `roots`.
        layer: whose outputs they are.
        entry: which matrix of a stack of experts it is.
    """
    found = roots(g, rows)
    if block is None or not g.batch:
        return found
    order = rows_of_parts(block)[entry] if entry is not None else _order(block, layer).flatten()
    order = order.to(found.root.device)
    return Roots(
        *(_placed(parts, order, diagonal=isinstance(g, DiagonalGram)) for parts in (found.root, found.inverse))
    )


def parts_of(moment: Gram | DiagonalGram) -> list[Gram | DiagonalGram]:
    """Each entry of a batch by itself; without a batch, the moment.

    Args:
        moment: of all parts.
    """
    if not moment.batch:
        return [moment]
    counts = torch.as_tensor(moment.count).expand(moment.batch)
    return [type(moment).of(*each) for each in zip(moment.total, moment.sum, counts, strict=True)]


def parts_of_roots(back: Roots, block: Block | None, layer: nn.Module, num: int) -> list[Roots]:
    """For each part the roots over the layer's outputs with its own rows alone; of one part, they themselves.

    Args:
        back: blocks along a diagonal.
        block: of the layer's weight.
        layer: whose outputs they are.
        num: of parts.
    """
    if num == 1:
        return [back]
    assert block is not None
    found = []
    for rows in _order(block, layer):
        root = torch.zeros_like(back.root)
        root[rows] = back.root[rows]
        found.append(Roots(root, back.inverse))
    return found


def _order(block: Block, layer: nn.Module) -> Tensor:
    """For each part of a fused matrix which of the layer's outputs its rows are."""
    layout = layout_of(layer)
    assert layout is not None
    outputs = torch.arange(layout.matrices[0])[:, None].expand(layout.matrices)
    return block.split(layout.join(outputs))[..., 0]


def _placed(parts: Tensor, order: Tensor, *, diagonal: bool) -> Tensor:
    if diagonal:
        return torch.empty_like(parts.flatten()).index_copy_(0, order, parts.flatten())
    whole = torch.empty(len(order), len(order), dtype=parts.dtype, device=parts.device)
    whole[order[:, None], order] = torch.block_diag(*parts.flatten(0, -3))
    return whole
