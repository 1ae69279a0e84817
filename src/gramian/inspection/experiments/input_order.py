"""Inputs as sets: tokens, vectors of a sequence, or the patches of an image, and the same in another order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.batch import main_input, mapped
from gramian.inspection.experiments.replay import Asked, are_equal, outputs_of
from gramian.inspection.passes.batch_roles import given_of
from gramian.inspection.passes.padding import filled_ends, padding_of
from gramian.inspection.passes.step_records import Observed

__all__ = ["are_in_order", "as_set", "ignores_order", "run_along_rows", "without_order"]

# Members of a set from which on their order is looked at.
LONG = 4
# Classes of tokens that are told apart, and quantiles that stand for what numbers a set has, in whatever order.
MOST_TOKENS, QUANTILES = 512, 5
# Shuffles with which neighbors are compared, and deviations of theirs from which on tokens are in an order.
SHUFFLES, DEVIATIONS = 20, 6.0


def ignores_order(asked: Asked) -> bool | None:
    """Whether tokens, vectors of a sequence or patches may change places, padding with them.

    The output then stays as it is, or, where there is one for each position, changes places in the same way. One that
    does not depend on the inputs at all says nothing of their order.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: whether; `None` where the inputs are no sets of at least 4, or come beside others than masks.
    Raises: what the model raises.
    Cost: a forward pass of 16 samples.
    """
    x = main_input(asked.batch)
    if x.ndim < 2:
        return None
    names = {g.name for g in given_of(asked.seen.batches[:1], asked.seen.fed, set()) if g.is_input}
    others = [g.values[0] for g in given_of([asked.batch], set(), set()) if g.name in names and g.values[0] is not x]
    masks = [t for t in others if t.shape == x.shape[:2] and bool(((t == 0) | (t == 1)).all())]
    order = _order(x)
    other = (
        _in_another_order(asked.model, asked.seen, x, order) if len(names) == len(others) + 1 and len(x) > 1 else None
    )
    if other is None or len(masks) < len(others) or bool((other == x).all()):
        return None
    moved = mapped(asked.batch, lambda t: other if t is x else t[:, order] if any(t is mask for mask in masks) else t)
    with torch.no_grad():
        one, two = asked.replay.single, outputs_of(asked, moved)
    if one is None or two is None or len(one) != len(x):
        return None
    if one.ndim == 3 and x.ndim < 4 and one.shape[1] == x.shape[1]:
        return are_equal(one[:, order], two) and not asked.is_deaf
    return are_equal(one, two) and not asked.is_deaf if one.ndim == 2 else None


def are_in_order(model: nn.Module, batches: Sequence[Any], *, dim: int = 1) -> bool:
    """Whether tokens follow each other in an order: pairs of neighbors repeat more than where each row is shuffled.

    Args:
        model: tells which tokens are padding, which is left out.
        batches: of tokens (N, T), the main inputs.
        dim: the dimension along which they may follow each other; along the first one, batches of one size.

    Returns: whether the pairs' repetitions are 6 standard deviations beyond those of 20 shuffles.
    Cost: 20 sorts of the tokens.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, hidden = [], []
    for batch in batches:
        x = main_input(batch)
        padding = padding_of(model, batch, x)
        hide = torch.zeros(x.shape, dtype=torch.bool) if padding is None else padding.cpu()
        if x.ndim == 2 and dim == 0:
            x, hide = x.T, hide.T
        if dim or not tokens or x.shape[-1] == tokens[0].shape[-1]:
            tokens.append(x.detach().cpu().long())
            hidden.append(hide)
    if any(t.ndim != 2 or t.shape[1] != tokens[0].shape[1] for t in tokens):
        return False
    rows, padding = torch.cat(tokens), torch.cat(hidden)

    def repeats(keys: Tensor) -> float:
        order = (keys + 2 * padding).argsort(dim=1, stable=True)
        x, valid = rows.gather(1, order), ~padding.gather(1, order)[:, 1:]
        pairs = torch.stack((x[:, :-1][valid], x[:, 1:][valid]), 1)
        return float(torch.unique(pairs, dim=0, return_counts=True)[1].double().square().sum())

    here = repeats(torch.zeros(rows.shape))
    shuffled = torch.tensor([repeats(torch.rand(rows.shape, generator=generator)) for _ in range(SHUFFLES)])
    return here > float(shuffled.mean() + DEVIATIONS * shuffled.std() + 1e-9)


def run_along_rows(model: nn.Module, batches: Sequence[Any]) -> bool:
    """Whether (N, T) tokens are sequences along the second dimension, and clearly not along the first.

    Args:
        model: tells which tokens are padding.
        batches: as they are given.

    Returns: whether padding fills the ends of rows and of no columns, or neighbors in rows repeat more than in shuffled
        ones and neighbors in columns do not.
    Raises: what `main_input` raises.
    Cost: 40 sorts of the tokens.
    """
    x = main_input(batches[0])
    if x.ndim != 2 or x.is_floating_point():
        return False
    along_rows, along_columns = (filled_ends(t) is not None for t in (x, x.T))
    if along_rows != along_columns:
        return along_rows
    return are_in_order(model, batches) and not are_in_order(model, batches, dim=0)


def _order(x: Tensor, num: int | None = None) -> Tensor:
    """The order of the members of a set, as many as the second dimension or `num`."""
    return torch.randperm(num or x.shape[1], generator=torch.Generator().manual_seed(0)).to(x.device)


def _in_another_order(model: nn.Module, seen: Observed, x: Tensor, order: Tensor) -> Tensor | None:
    """Tokens, vectors or patches, as for `as_set`, in another order; `None` where there are no 4 of them."""
    patch = _patch(model, seen, x)
    members = _cut(x, patch) if patch else x
    if not patch and not (x.ndim == 2 and not x.is_floating_point()) and not (x.ndim == 3 and x.is_floating_point()):
        return None
    if members.shape[1] < LONG:
        return None
    members = members[:, _order(x, members.shape[1]) if patch else order]
    return _joined(members, x.shape, patch) if patch else members


def as_set(model: nn.Module, seen: Observed, x: Tensor) -> Tensor:
    """The features of a set's members, (N, number, features): of tokens, which it is; of images, the patch.

    Args:
        model, seen: as they were observed.
        x: tokens (N, T), vectors (N, T, C), or images (N, C, H, W) that the model cuts into patches first.

    Returns: a tensor of floats.
    Cost: a copy.
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
    Cost: a sort along the members.
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
