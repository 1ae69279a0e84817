"""Which tokens of a batch are padding."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from gramian.batch import token_mask
from gramian.errors import GramianError

__all__ = ["filled_ends", "padding_of"]

# Tokens that are padding by where they stand, from which on they count.
FEW = 16


def padding_of(model: nn.Module, batch: Any, x: Tensor, *, is_main: bool = True) -> Tensor | None:
    """Where (N, T) inputs are padding: by an embedding's padding_idx, the batch's attention mask, or their ends.

    Args:
        model: has the embeddings.
        batch: has the mask.
        x: (N, T) tokens, or (N, T, …) numbers.
        is_main: whether the batch's mask is of these.

    Returns: true where they are padding; `None` where nothing tells.
    Cost: a pass over the tokens.
    """
    if x.ndim == 2 and not x.is_floating_point():
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                found = x == module.padding_idx
                if bool(found.any()):
                    return found
    mask = None
    with suppress(GramianError):  # a tuple of more parts than inputs, labels and weights has no mask by name
        mask = token_mask(batch) if is_main else None
    if mask is not None and len(mask) == len(x):
        return ~mask.to(x.device)
    return (
        filled_ends(x) if x.ndim == 2 and not x.is_floating_point() and len(x.unique()) > 2 else None
    )  # no mask itself


def filled_ends(x: Tensor) -> Tensor | None:
    """Where one token fills the ends, or the beginnings, of rows of several lengths, and is nowhere else.

    Args:
        x: (N, T) tokens.

    Returns: true there; `None` where none does.
    Cost: a few passes over the tokens.
    """
    for tokens in (x, x.flip(1)):
        value = tokens[:, -1].mode().values
        found = tokens == value
        tail = found.flip(1).cumprod(1).flip(1).bool()
        lengths = found.sum(1)
        if bool((found == tail).all()) and int(found.sum()) >= FEW and len(lengths[lengths > 0].unique()) > 1:
            return found if tokens is x else found.flip(1)
    return None
