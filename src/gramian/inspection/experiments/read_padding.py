"""Where the loss reads a sequence: at its end, or behind it, at padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gramian.batch import main_input, tensors
from gramian.inspection.experiments.replay import Asked
from gramian.inspection.passes.batch_roles import Given, given_of
from gramian.inspection.passes.padding import filled_ends, padding_of
from gramian.recording.hooks import hooks
from gramian.samples import first_samples
from gramian.seeding import seed_torch

__all__ = ["Counted", "Reading", "counts_padding", "reads_padding"]

ENOUGH = 32
# Share of the samples that are read at padding from which on that is told.
PADDED = 0.2
# Share of all positions that are padding, from which on it is told that they count.
FEW = 0.05


@dataclass(frozen=True)
class Reading:
    """The module whose output is read at one position alone, and how many samples have padding there.

    At position 0, the loss reads nothing but padding.
    """

    name: str
    position: int
    padded: int
    num: int
    is_state: bool = False


@dataclass(frozen=True)
class Counted:
    """Padding whose labels are all one class, and count in the loss.

    Attributes:
        name: of the labels.
        label: at all padded positions of all batches.
        padded: number of them.
        num: number of all positions.
        is_end: whether padding may be what ends a text: the classes are the vocabulary of the inputs, and it is a
            token's label too, or fills few positions.
        is_known: whether an embedding's padding_idx says what padding is.
    """

    name: str
    label: int
    padded: int
    num: int
    is_end: bool
    is_known: bool


def counts_padding(asked: Asked) -> Counted | None:
    """Whether the loss takes the scores at padding, where all labels are one class.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: what was found, or `None`.
    Raises: what the model raises.
    Cost: a pass forward and backward of 32 samples, where tokens are padded and their labels there are one class.
    """
    model, seen = asked.model, asked.seen
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    known = [m for m in tables if m.padding_idx is not None]
    given = [g for g in given_of(seen.batches, seen.fed, set()) if g.values[0].ndim == 2 and _are_whole(g.values)]
    labels = [g for g in given if not g.is_input]
    inputs = [g for g in given if g.is_input and labels and _shapes(g) == _shapes(labels[0])]
    if len(labels) != 1 or len(inputs) != 1 or len(known) > 1 or not tables:
        return None
    places = [_padding(x, known) for x in inputs[0].values]
    padding = torch.cat([t.flatten() for t in places])
    y = torch.cat([t.flatten() for t in labels[0].values])
    there, others = y[padding], y[~padding]
    if len(there) < FEW * len(y) or len(there.unique()) != 1 or len(others.unique()) < 2 or int(there[0]) < 0:
        return None
    is_apart = not bool((others == there[0]).any())
    if not known and not is_apart:  # by where it stands alone
        return None
    made: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        made.extend(t for t in tensors(output) if t.is_floating_point() and t.requires_grad)

    batch = first_samples(seen.batches[0], ENOUGH)
    with hooks([model.register_forward_hook(keep)]):
        seed_torch(0)
        with torch.enable_grad():
            total, _ = asked.objective.loss(model, batch)
    here = places[0][:ENOUGH]
    if len(made) != 1 or made[0].ndim != 3 or not total.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(total, made, allow_unused=True)
    is_last = tuple(made[0].shape[:2]) == tuple(here.shape)
    if gradient is None or not (is_last or (made[0].shape[0], made[0].shape[2]) == tuple(here.shape)):
        return None
    axis = 2 if is_last else 1
    if not bool(gradient.ne(0).any(axis)[here.to(gradient.device)].any()):
        return None
    are_tokens = any(made[0].shape[axis] == table.num_embeddings for table in known or tables)
    is_end = are_tokens and not (is_apart and len(there) >= PADDED * len(y))
    return Counted(labels[0].name, int(there[0]), len(there), len(y), is_end, bool(known))


def _shapes(given: Given) -> list[torch.Size]:
    return [t.shape for t in given.values]


def _padding(x: Tensor, known: list[nn.Embedding]) -> Tensor:
    """Where tokens are padding: by an embedding's padding_idx, or by the ends of rows that one of them fills."""
    if known:
        return x == known[0].padding_idx
    found = filled_ends(x) if len(x.unique()) > 2 else None
    return torch.zeros_like(x, dtype=torch.bool) if found is None else found


def _are_whole(values: list[Tensor]) -> bool:
    return not any(t.is_floating_point() or t.is_complex() or t.dtype == torch.bool for t in values)


def reads_padding(asked: Asked) -> Reading | None:
    """Whether of a sequence that was computed the loss reads one position alone, which is padding in many samples.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `Reading`, or `None`.
    Raises: what the model raises.
    Cost: a pass forward and backward of 32 samples, where inputs are padded.
    """
    model, seen, objective = asked.model, asked.seen, asked.objective
    batch = first_samples(seen.batches[0], ENOUGH)
    main = main_input(batch)
    fed = {g.name for g in given_of(seen.batches[:1], seen.fed, set()) if g.is_input}
    tokens = [g.values[0] for g in given_of([batch], set(), set()) if g.name in fed]
    found = [
        (x, p)
        for x in tokens
        if x.ndim in (2, 3) and x.shape[1] > 2 and (p := padding_of(model, batch, x, is_main=x is main)) is not None
    ]
    found = [(x, p) for x, p in found if any(float(p[:, i].float().mean()) >= PADDED for i in (0, -1))]
    if not found:
        return None
    made: list[tuple[str, Tensor, Tensor | None]] = []
    shapes = {tuple(x.shape[:2]) for x, _ in found}

    def hook(name: str) -> Callable:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            given = args[0] if args else None
            state = None
            if isinstance(output, tuple) and output and isinstance(module, nn.RNNBase):
                state = output[1][0] if isinstance(output[1], tuple) else output[1]
                state = None if isinstance(given, PackedSequence) or not state.requires_grad else state
            values = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(values, Tensor) or values.ndim != 3 or not values.requires_grad:
                return
            if {tuple(values.shape[:2]), tuple(values.shape[:2])[::-1]} & shapes:
                made.append((name, values, state))

        return keep

    with hooks([m.register_forward_hook(hook(n)) for n, m in model.named_modules() if n]):
        seed_torch(0)
        with torch.enable_grad():
            total, _ = objective.loss(model, batch)
    if not made or not total.requires_grad:
        return None
    values = [t for _, t, _ in made]
    states = [s for _, _, s in made if s is not None]
    grads = torch.autograd.grad(total, [*values, *states], allow_unused=True)
    of_state = iter(grads[len(values) :])
    for (name, t, state), gradient in reversed(
        [((n, t, None if s is None else next(of_state)), g) for (n, t, s), g in zip(made, grads, strict=False)]
    ):
        for x, padding in found:
            is_first = tuple(t.shape[:2]) == tuple(x.shape[:2])
            if not is_first and tuple(t.shape[:2])[::-1] != tuple(x.shape[:2]):
                continue
            padding = padding.to(t.device)
            if gradient is None:
                if state is not None and bool(state.any()):
                    padded = int(padding[:, -1].sum())
                    return (
                        Reading(name, x.shape[1], padded, len(x), is_state=True) if padded >= PADDED * len(x) else None
                    )
                continue
            read = gradient.ne(0).any(-1)
            read = read if is_first else read.T
            if bool(read.any()) and not bool((read & ~padding).any()):
                return Reading(name, 0, int((read & padding).any(1).sum()), len(x))
            places = read.any(0).nonzero().flatten().tolist()
            if len(places) == 1 and places[0] in (0, x.shape[1] - 1):
                padded = int((padding[:, places[0]] & read[:, places[0]]).sum())
                if padded >= PADDED * len(x):
                    return Reading(name, places[0] + 1, padded, len(x))
            return None
    return None
