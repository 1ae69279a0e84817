"""Whether an output is the log-determinant of another one's Jacobian, and what the loss does with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import main_input, mapped, num_samples
from gramian.inspection.experiments.prerequisites import takes_only_outputs
from gramian.inspection.experiments.replay import Asked, loss_of
from gramian.recording.hooks import hooks

__all__ = ["Density", "log_determinant"]

# Samples whose Jacobians are taken, and numbers of a sample that are too many.
SAMPLES, WIDE = 4, 64
# How far a log-determinant may miss, and below which size it does not tell its sign.
EXACT, CLEAR = 1e-3, 1e-2
# How parameters are moved where transformations begin as the identity.
MOVED = 0.1


@dataclass(frozen=True)
class Density:
    """What the loss does with log |det J|: nothing, or it falls as that does.

    Attributes:
        kind: "reversed", "missing".
        error: by how much the output misses the determinant at most.
        slope: of the loss of all samples along it.
    """

    kind: str
    error: float
    slope: float


def log_determinant(asked: Asked) -> Density | None:
    """Compare an output of one number for each sample with the Jacobian of one of the input's size.

    By the change of variables, log p(x) = log p(z) + log |det ∂z/∂x|: where the loss is to make p(x) large, or, of a
    sampler, the divergence small, a larger determinant lowers it.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `Density`, or `None` where all is well, or where there is no such output.
    Raises: what the model raises.
    Cost: nothing without such outputs; else a pass forward and backward of 4 samples for each number of one.
    Source: Rezende and Mohamed 1505.05770, equation 5.
    """
    replay = asked.replay
    x = main_input(asked.batch)
    if not replay.is_known or replay.calls != 1 or not x.is_floating_point() or x.ndim < 2:
        return None
    num, dim = len(x), x[0].numel()
    wide = [i for i, t in enumerate(replay.outputs) if t.numel() == x.numel() and t.ndim and len(t) == num]
    single = [i for i, t in enumerate(replay.outputs) if t.numel() == num and t.ndim and len(t) == num]
    if len(wide) != 1 or len(single) != 1 or not 2 <= dim <= WIDE or wide == single:
        return None
    which = single[0]
    found = _compared(asked, x, wide[0], which)
    if found is None or abs(found[0]) < CLEAR:
        with _moved(asked.model):
            found = _compared(asked, x, wide[0], which)
    if found is None or abs(found[0]) < CLEAR:
        return None
    size, error, sign = found
    slope = float(replay.slopes[which].double().sum())
    if sign * slope < 0 or not error <= EXACT * (1 + abs(size)):
        return None
    if slope == 0 and not takes_only_outputs(asked):
        return None
    return Density("reversed" if slope else "missing", error, slope)


def _compared(asked: Asked, x: Tensor, wide: int, single: int) -> tuple[float, float, float] | None:
    """The largest log-determinant, by how much an output misses it at most, and whether by its sign."""
    dim = x[0].numel()
    rows = min(SAMPLES, len(x))
    num = num_samples(asked.batch)

    def repeated(t: Tensor) -> Tensor:
        part = t[:rows].repeat_interleave(dim, 0) if t.ndim and len(t) == num else t
        return part.detach().requires_grad_() if t is x else part

    batch = mapped(asked.batch, repeated)
    given = main_input(batch)
    made: list[list[Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        values: list[Tensor] = []

        def take(t: Tensor) -> Tensor:
            if t.is_floating_point():
                values.append(t)
            return t

        mapped(output, take)
        made.append(values)

    with hooks([asked.model.register_forward_hook(keep)]):
        loss_of(asked.model, batch, asked.objective)
    z, told = made[0][wide].reshape(rows, dim, dim), made[0][single].reshape(rows, dim)[:, 0].detach().double()
    if not z.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(z.diagonal(dim1=1, dim2=2).sum(), given, allow_unused=True)
    if gradient is None:
        return None
    real = torch.linalg.slogdet(gradient.reshape(rows, dim, dim).double()).logabsdet
    if not bool(real.isfinite().all()):
        return None
    errors = {sign: float((told - sign * real).abs().amax()) for sign in (1.0, -1.0)}
    sign = min(errors, key=lambda s: errors[s])
    return float(real[real.abs().argmax()]), errors[sign], sign


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """The model with noise in its parameters."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    kept = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in parameters:
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.add_(noise * (p.square().mean().sqrt() + MOVED), alpha=MOVED)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
