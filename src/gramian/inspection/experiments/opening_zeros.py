"""What is zero on purpose, by experiment: whether a step opens it, and whether zeros keep each other shut."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import tensors
from gramian.block import blocks
from gramian.inspection.passes.nonfinite_derivatives import gradients_of
from gramian.inspection.passes.step_records import Observed
from gramian.objective import Objective
from gramian.recording.hooks import hooks
from gramian.recording.measuring import training

__all__ = ["Opening", "open_zeros"]

# Steps after which what is behind several zeros has opened: a head, then gates, then the branches behind these.
STEPS = 4
# Size of a step of an entry that is zero, and of the values that take the place of zeros that get no gradient. Large,
# so that a narrow dtype does not lose what follows from it; what is found is whether a gradient is zero, not its size.
SIZE = 0.02
# rms √fan_in below which a matrix counts as one that begins small.
SMALL = 0.1


@dataclass(frozen=True)
class Opening:
    """Why gradients are exactly zero, as far as zeros are the reason.

    Attributes:
        waiting: parameters whose gradient is exactly zero now and is not after what is zero has made a few steps along
            its own gradient.
        shut: parameters, and parts of fused ones as `blocks` names them, that are zero and whose gradient stays so, and
            would not if they, together, were not zero.
        last: matrices of zeros, or small ones, behind which no module with parameters comes, as in a head.
    """

    waiting: frozenset[str] = frozenset()
    shut: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()


def open_zeros(model: nn.Module, observed: Observed, objective: Objective, parts: Collection[str] = ()) -> Opening:
    """Find out which gradients are exactly zero because a factor is, and whether training makes them other than zero.

    An underflow, a flat loss and dead units are no matter of zeros among the parameters: there no gradient changes.

    Args:
        model: trained as it stands for a few steps of its zeros; parameters, buffers and modes are restored.
        observed: of this model; has its batches.
        objective: gives the loss.
        parts: names of matrices that are zero, in parameters that hold others too.

    Returns: an `Opening`, empty where no parameter and no gradient is zero.
    Raises: what the model raises.
    Cost: nothing where no matrix is small and no gradient zero; a pass forward and backward where one is small; else up
        to 6, and a copy of the parameters that have zeros.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    trained = {n: p for n, p in parameters.items() if p.requires_grad and observed.gradients.get(n) is not None}
    zeros = {n: p for n, p in parameters.items() if not bool(p.detach().any())}
    fused = _parts(model, [n for n in parts if n.partition("[")[0] in trained])
    pending = {n for n in trained if observed.gradients[n] == 0.0} | set(fused)
    with training(model):
        small = {n: p for n, p in parameters.items() if p.ndim > 1 and _is_small(p)}
        last = _last(model, observed.batches[0], objective, small)
        if not pending:
            return Opening(last=last)
        with _restored({n: p for n, p in trained.items() if bool((p.detach() == 0).any())}) as opened:
            left = _step(model, observed.batches, objective, trained, pending, opened, fused)
            left -= {n for n in fused if n.partition("[")[0] in left}
            closed = {n: parameters[n.partition("[")[0]] for n in left if n in zeros or n in fused}
            shut = _without(model, observed.batches, objective, closed, fused) if any(map(_counts, closed)) else set()
    return Opening(frozenset(pending - left - set(fused)), frozenset(filter(_counts, shut)), last)


def _is_small(p: Tensor) -> bool:
    """Whether a matrix is zero or begins small, as a policy's head with a gain of 0.01 does."""
    fan_in = p.numel() // max(1, len(p))
    return float(p.detach().float().square().mean()) * fan_in < SMALL**2


def _parts(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The numbers of the entries of matrices that are parts of a parameter."""
    found: dict[str, Tensor] = {}
    for block in blocks(model).blocks if names else ():
        if len(block.names) > 1 and not set(block.names).isdisjoint(names):
            numbers = torch.arange(block.parameter.numel(), device=block.parameter.device).view(block.parameter.shape)
            pieces = zip(block.names, block.layout.pieces(numbers, block.role == "elementwise"), strict=True)
            found |= {name: piece.flatten() for name, piece in pieces if name in names}
    return found


def _arrived(names: Iterable[str], gradients: Mapping[str, Tensor], fused: Mapping[str, Tensor]) -> set[str]:
    """Those of the parameters and parts whose gradient has an entry that is not zero."""
    own = {n: gradients[n.partition("[")[0]] for n in names}
    return {n for n, g in own.items() if bool((g.flatten()[fused[n]] if n in fused else g).any())}


def _counts(name: str) -> bool:
    """Whether a parameter is told: biases start at zero everywhere."""
    return "bias" not in name.rpartition(".")[2]


def _step(
    model: nn.Module,
    batches: Sequence[Any],
    objective: Objective,
    trained: Mapping[str, nn.Parameter],
    pending: set[str],
    opened: Mapping[str, nn.Parameter],
    fused: Mapping[str, Tensor],
) -> set[str]:
    """Steps the zeros of `opened` along their gradients; returns which of `pending` never get one."""
    left = set(pending)
    for i in range(max(STEPS, len(batches))):
        gradients = _gradients(model, batches[i % len(batches)], objective, trained)
        left -= _arrived(left, gradients, fused)
        if not left:
            break
        moved = False
        for n, p in opened.items():
            step = torch.where(p.detach() == 0, gradients[n].to(p.dtype), 0)
            largest = step.abs().amax()
            if largest > 0:
                moved = True
                p.data.sub_(step / largest, alpha=SIZE)
        if not moved and i >= len(batches):
            break
    return left


def _without(
    model: nn.Module,
    batches: Sequence[Any],
    objective: Objective,
    closed: Mapping[str, nn.Parameter],
    fused: Mapping[str, Tensor],
) -> set[str]:
    """Those of the zeros that get a gradient once all of them have other values."""
    generator = torch.Generator().manual_seed(0)
    for n, p in closed.items():
        others = (SIZE * torch.randn(p.shape, generator=generator)).to(p)
        if n in fused:
            others = p.detach().flatten().scatter(0, fused[n], others.flatten()[fused[n]]).view(p.shape)
        p.data.copy_(others)
    wanted = {n.partition("[")[0]: p for n, p in closed.items()}
    found = set()
    for batch in islice(batches, 2):
        found |= _arrived(closed, _gradients(model, batch, objective, wanted), fused)
    return found


def _gradients(
    model: nn.Module, batch: Any, objective: Objective, wanted: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    with torch.enable_grad():
        total, units = objective.loss(model, batch)
        found = gradients_of(total / units, list(wanted.values()))
    dense = [g if g is None or not g.is_sparse else g.to_dense() for g in found]
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wanted.items(), dense, strict=True)}


@contextmanager
def _restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[Mapping[str, nn.Parameter]]:
    """A context after which these parameters have their values again."""
    kept = {n: p.detach().clone() for n, p in parameters.items()}
    try:
        yield parameters
    finally:
        for n, p in parameters.items():
            p.data.copy_(kept[n])


def _last(model: nn.Module, batch: Any, objective: Objective, zeros: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Those of the matrices on which the input of no module with parameters depends."""
    wanted = {n: p for n, p in zeros.items() if p.requires_grad}
    if not wanted:
        return frozenset()
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.extend(t for t in tensors((args, kwargs)) if t.requires_grad and t.is_floating_point())

    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    with hooks([m.register_forward_pre_hook(keep, with_kwargs=True) for m in owners]), torch.enable_grad():
        objective.loss(model, batch)
        if not inputs:
            return frozenset(wanted)
        total = torch.stack([t.sum().float() for t in inputs]).sum()
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return frozenset(n for n, g in zip(wanted, found, strict=True) if g is None)
