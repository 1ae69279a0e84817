"""Arguments with which the model is called and that change none of its outputs, whatever the loss makes of them too."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gramian.arguments import arguments_of
from gramian.batch import mapped, tensors
from gramian.inspection.experiments.filled_zeros import unzeroed
from gramian.inspection.experiments.replay import Asked
from gramian.recording.hooks import hooks
from gramian.seeding import seed_torch

__all__ = ["unheard_arguments"]

# Samples that must differ from their neighbors.
FEW = 4


def unheard_arguments(asked: Asked) -> tuple[str, ...]:
    """The arguments of which each sample can be given another's, and all outputs stay the same to the last bit.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: their names in `forward`; none where there is one, or none has an effect.
    Raises: what the model raises.
    Cost: two to four forward passes of 16 samples for each argument that is a tensor, where there are several.
    """
    takes = arguments_of(asked.model)
    if not (takes.any_place or takes.any_name or len({*takes.names, *takes.places}) > 1):
        return ()
    called: list[tuple[tuple, dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        called.append((args, kwargs))

    with hooks([asked.model.register_forward_pre_hook(keep, with_kwargs=True)]):
        asked.objective.loss(asked.model, asked.batch)
    args, kwargs = called[0] if called else ((), {})
    given = {name: t for name, t in _named(asked.model, args, kwargs) if _varies(t)}
    if len(given) < 2 or len({len(t) for t in given.values()}) > 1:
        return ()

    def run(changed: Tensor | None = None) -> list[Tensor]:
        def other(t: Tensor) -> Tensor:
            return torch.cat((t[1:], t[:1])) if t is changed else t

        seed_torch(0)
        made = asked.model(*mapped(args, other), **mapped(kwargs, other))
        return [t for t in tensors(made) if t.is_floating_point()]

    def silent(names: list[str]) -> list[str]:
        whole, again = run(), run()
        if not whole or not all(map(torch.equal, whole, again)):
            return []
        return [n for n in names if all(map(torch.equal, whole, run(given[n])))]

    with torch.no_grad():
        found = silent(list(given))
        if found and len(found) < len(given):
            with unzeroed(asked.model) as are_others:
                found = silent(found) if are_others else found
    return tuple(found) if len(found) < len(given) else ()


def _named(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The arguments that are tensors, by their names in `forward`."""
    names = list(inspect.signature(model.forward).parameters)
    placed = [(names[i] if i < len(names) else f"argument {i}", v) for i, v in enumerate(args)]
    return [(name, t) for name, t in (*placed, *kwargs.items()) if isinstance(t, Tensor)]


def _varies(t: Tensor) -> bool:
    """Whether enough samples differ, and the tensor is no mask, which may have no effect where nothing is padding."""
    if not t.ndim or len(t) <= FEW or bool(((t == 0) | (t == 1)).all()):
        return False
    return int((t != t.roll(1, 0)).flatten(1).any(1).sum() if t.ndim > 1 else (t != t.roll(1, 0)).sum()) >= FEW
