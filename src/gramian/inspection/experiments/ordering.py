"""Inputs as sets: tokens, vectors of a sequence, or the patches of an image, and the same in another order."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.inspection.passes.observed import Observed

__all__ = ["as_set", "in_another_order", "without_order"]

# Members of a set from which on their order is looked at.
LONG = 4
# Classes of tokens that are told apart, and quantiles that stand for what numbers a set has, in whatever order.
MOST_TOKENS, QUANTILES = 512, 5


def in_another_order(model: nn.Module, seen: Observed, x: Tensor) -> Tensor | None:
    """The inputs with their members in another order.

    Args:
        model: takes them.
        seen: of this model.
        x: tokens (N, T), vectors (N, T, C), or images (N, C, H, W) that the model cuts into patches first.

    Returns: a tensor of the same shape; `None` where the inputs are no sets of at least 4.
    Raises: nothing of its own.
    Cost: a copy.
    Source: this library's own.
    """
    patch = _patch(model, seen, x)
    members = _cut(x, patch) if patch else x
    if not patch and not (x.ndim == 2 and not x.is_floating_point()) and not (x.ndim == 3 and x.is_floating_point()):
        return None
    if members.shape[1] < LONG:
        return None
    generator = torch.Generator().manual_seed(0)
    members = members[:, torch.randperm(members.shape[1], generator=generator).to(x.device)]
    return _joined(members, x.shape, patch) if patch else members


def as_set(model: nn.Module, seen: Observed, x: Tensor) -> Tensor:
    """The features of a set's members, (N, number, features): of tokens, which it is; of images, the patch.

    Args:
        model, seen, x: as for `in_another_order`, which is not `None`.

    Returns: a tensor of floats.
    Raises: nothing of its own.
    Cost: a copy.
    Source: this library's own.
    """
    patch = _patch(model, seen, x)
    if patch:
        return _cut(x, patch).float()
    if x.is_floating_point():
        return x.float()
    num = min(int(x.max()) + 1, MOST_TOKENS)
    return F.one_hot(x.long().clamp(min=0, max=num - 1), num).float()


def without_order(members: Tensor, *, are_tokens: bool) -> Tensor:
    """What a set has in whatever order: how often each token comes, or quantiles of each feature.

    Args:
        members: as `as_set` gives them.
        are_tokens: whether each is one token.

    Returns: one row for each sample.
    Raises: nothing of its own.
    Cost: a sort along the members.
    Source: this library's own.
    """
    if are_tokens:
        return members.sum(1)
    levels = torch.linspace(0, members.shape[1] - 1, QUANTILES).round().long().to(members.device)
    return torch.cat((members.sort(1).values[:, levels].flatten(1), members.mean(1), members.std(1)), 1)


def _patch(model: nn.Module, seen: Observed, x: Tensor) -> int:
    """The side of the patches into which the first layer with a matrix cuts images; 0 where it does not."""
    if x.ndim != 4 or not x.is_floating_point():
        return 0
    for call in seen.calls:
        module = model.get_submodule(call.name)
        if isinstance(module, nn.Conv2d):
            side = module.kernel_size[0]
            is_cut = module.kernel_size == module.stride == (side, side) and module.padding in ((0, 0), "valid")
            is_first = seen.image_sizes.get(call.name) == tuple(x.shape[2:]) and module.in_channels == x.shape[1]
        elif isinstance(module, nn.Linear):
            side = math.isqrt(module.in_features // x.shape[1])
            num = x.shape[2] * x.shape[3] // max(1, side * side)
            is_cut, is_first = side * side * x.shape[1] == module.in_features, call.shape[1:2] == (num,)
        else:
            continue
        fits = side > 0 and x.shape[2] % side == x.shape[3] % side == 0
        return side if is_cut and is_first and fits else 0
    return 0


def _cut(x: Tensor, side: int) -> Tensor:
    """The patches of images, (N, number, C · side²)."""
    grid = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _joined(patches: Tensor, shape: torch.Size, side: int) -> Tensor:
    """The images of patches."""
    rows, columns = shape[2] // side, shape[3] // side
    grid = patches.unflatten(2, (shape[1], side, side)).unflatten(1, (rows, columns))
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(shape)
