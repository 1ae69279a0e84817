"""Whether a gradient reaches parameters, and positions of a sequence, on which the loss depends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import main_input, mapped
from gramian.inspection.experiments.replay import Asked, are_equal, loss_of, outputs_of
from gramian.recording.hooks import hooks
from gramian.seeding import seed_torch

__all__ = ["cut", "gradient_by", "unlinked"]

# Parameters that are tried one by one, and positions of a sequence from which on it is looked at.
MOST, LONG = 32, 4


def unlinked(asked: Asked) -> tuple[str, ...] | None:
    """The parameters of modules that are called, get no gradient, and change the loss.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: names; `None` where all have a gradient, or the loss is another with the same values.
    Raises: what the model raises.
    Cost: two evaluations of the loss, and one for each of up to 32 such parameters.
    """
    model, seen, objective = asked.model, asked.seen, asked.objective
    parameters = dict(model.named_parameters())
    missing = [n for n, g in seen.gradients.items() if g is None and n in seen.used]
    if not missing or not seen.needs_gradient:
        return None
    batch = seen.batches[0]

    def changes(names: Sequence[str]) -> bool:
        kept = {n: parameters[n].detach().clone() for n in names}
        try:
            for n in names:
                parameters[n].mul_(1.5).add_(0.1)
            return loss_of(model, batch, objective) != whole
        finally:
            for n, value in kept.items():
                parameters[n].copy_(value)

    with torch.no_grad():
        whole = loss_of(model, batch, objective)
        if loss_of(model, batch, objective) != whole or not changes(missing):
            return None
        return tuple(n for n in missing if changes([n])) if len(missing) <= MOST else tuple(missing)


def cut(asked: Asked) -> tuple[int, int, str] | None:
    """Positions whose gradient is exactly zero, where other values there change the output.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: how many there are, of how many, and the module whose output was looked at; or `None`.
    Raises: what the model raises.
    Cost: a pass forward and backward, and two forward, where the graph was cut.
    """
    seen, batch = asked.seen, asked.seen.batches[0]
    x = main_input(batch)
    if not seen.cuts or x.ndim not in (2, 3) or x.shape[1] < LONG or len(x) < 2 or not seen.needs_gradient:
        return None
    found = gradient_by(asked, batch, x)
    if found is None:
        return None
    name, gradient = found
    silent = ~gradient.ne(0).transpose(0, 1).flatten(1).any(1)
    num = int(silent.sum())
    if not x.shape[1] // 2 <= num < x.shape[1]:
        return None
    other = x.clone()
    other[:, silent] = x.roll(1, 0)[:, silent]
    with torch.no_grad():
        one, two = (outputs_of(asked, b) for b in (batch, mapped(batch, lambda t: other if t is x else t)))
    if one is None or two is None or are_equal(one, two):
        return None
    return num, x.shape[1], name


def gradient_by(asked: Asked, batch: Any, x: Tensor, scale: float = 1.0) -> tuple[str, Tensor] | None:
    """The gradient of the loss by an input, or, of codes, by the first vectors that a module makes of each.

    Args:
        asked: the model, left as it was, and its loss.
        batch: of which the loss is.
        x: a tensor of it.
        scale: of the loss.

    Returns: the name of the module, empty for the input itself, and the gradient; `None` where there is none.
    Raises: what the model raises.
    Cost: a pass forward and backward.
    """
    first: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            is_sequence = isinstance(output, Tensor) and output.ndim == 3 and output.shape[:2] == x.shape[:2]
            if not first and is_sequence and output.requires_grad:
                first.append((name, output))

        return keep

    given = x
    if x.is_floating_point():
        given = x.detach().clone().requires_grad_()
        first.append(("", given))
    with hooks([m.register_forward_hook(hook(n)) for n, m in asked.model.named_modules()]), torch.enable_grad():
        seed_torch(0)
        total, _ = asked.objective.loss(asked.model, mapped(batch, lambda t: given if t is x else t))
    if not first or not total.requires_grad:
        return None
    name, values = first[0]
    (gradient,) = torch.autograd.grad(total * scale, values, allow_unused=True)
    return None if gradient is None else (name, gradient)
