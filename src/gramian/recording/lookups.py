"""How lookups of rows of a weight are read: `embedding`, `embedding_bag`, and indexing by a tensor of indices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gramian.recording.form import Form, IsWeight, rows_of

__all__ = ["bag", "embedding", "index_select", "indexing"]


def embedding(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | int | None = None,
    norm_type: float | int = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Form | None:
    keep = None if padding_idx is None else (input != padding_idx % len(weight)).flatten()

    def inputs(mask: Tensor | None) -> Iterator[Tensor]:
        index = input.flatten()
        wanted = mask.flatten() if mask is not None and mask.shape == input.shape else None
        for part in (keep, wanted):
            index = index if part is None else index.masked_fill(~part, -1)
        yield index[index >= 0] if keep is not None or wanted is not None else index

    def outputs(grad: Tensor) -> Tensor:
        rows = rows_of(grad)
        return rows if keep is None else rows[keep]

    return Form("embedding", weight, input, inputs, outputs, (0,), (1,), onehot=True, follows_mask=True)


def indexing(is_weight: IsWeight, input: Tensor, index: Any) -> Form | None:
    """`table[index]` with integers: a lookup."""
    index = index[0] if isinstance(index, tuple) and all(part == slice(None) for part in index[1:]) else index
    index = torch.tensor(index, device=input.device) if isinstance(index, list) else index
    whole = isinstance(index, Tensor) and not index.is_floating_point() and index.dtype not in (torch.bool, torch.uint8)
    if not whole or not index.ndim or not is_weight(input) or input.ndim != 2:
        return None
    found = embedding(is_weight, index % len(input), input)
    return found and replace(found, op="indexing")


def index_select(is_weight: IsWeight, input: Tensor, dim: int, index: Tensor) -> Form | None:
    """The same by name."""
    return indexing(is_weight, input, index.reshape(-1)) if dim in (0, -input.ndim) else None


def bag(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | int | None = None,
    norm_type: float | int = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Form | None:
    """A row for each lookup: the one-hot index, and the bag's gradient times the lookup's weight in the bag."""
    if mode == "max":
        return None
    index = input.flatten()
    if offsets is None:
        bags = torch.arange(len(input), device=index.device).repeat_interleave(input.shape[1])
        num_bags = len(input)
    else:
        num_bags = len(offsets) - include_last_offset
        places = torch.arange(len(index), device=index.device)
        bags = torch.searchsorted(offsets[:num_bags].contiguous(), places, right=True) - 1
    if padding_idx is not None:
        keep = index != padding_idx % len(weight)
        index, bags = index[keep], bags[keep]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights.flatten()[keep]
    shares = per_sample_weights.detach().flatten() if per_sample_weights is not None else None
    if mode == "mean":
        shares = 1.0 / torch.bincount(bags, minlength=num_bags).clamp_min(1)[bags].double()

    def outputs(grad: Tensor) -> Tensor:
        rows = grad[bags]
        return rows if shares is None else rows * shares.unsqueeze(-1).to(rows.dtype)

    return Form("embedding", weight, input, lambda mask: iter([index]), outputs, (0,), (1,), onehot=True)
