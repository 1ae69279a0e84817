"""Healing: a compressed model learns from the model that it was made of, which is kept only where it helps."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gramian.compression.budget.points import losses_of
from gramian.compression.calibration.calibrating import around_output
from gramian.compression.calibration.measure import Measure
from gramian.compression.calibration.reading import Reader
from gramian.compression.fitting.refitting import pair_of
from gramian.compression.layers.lowrank import LowRank
from gramian.compression.storage.slicing import SLICED
from gramian.errors import InputError
from gramian.loader import Batches, as_batches, no_batches
from gramian.objective import Objective, as_objective
from gramian.recording import evaluating
from gramian.recording.forward_failures import naming_the_layer
from gramian.rows import Rows
from gramian.training.loop import train
from gramian.training.task import Run, Task

__all__ = ["Healed", "heal"]

RELATIVE = 2e-3
"""AdamW's learning rate, which is how far an entry moves in a step, as a share of the root mean square entry of the
matrices that learn: factors are near a minimum already. On the sentence transformer without 60 % of its encoder a rate
of 1e-4, and this one, brought the held-out distance down at every evaluation; 5e-4 first brought it up."""


DISTANCE = "distance to the teacher (half the square, for each unit of the loss)"


@dataclass(frozen=True, eq=False)
class Healed:
    """What healing came to.

    Attributes:
        model: the healed model, or where that was no better the one that was given.
        kept: whether it is the healed one.
        reason: why, in a sentence.
        before: half the squared distance to the teacher's outputs, for each of the objective's units (a sample, a
            token), averaged over held-out data, of the model that was given.
        after: that of the healed one.
        other_before: on the second domain; `None` without one.
        other_after: of the healed one.
        steps: that were taken.
        seconds: of training.
    """

    model: nn.Module
    kept: bool
    reason: str
    before: float
    after: float
    other_before: float | None
    other_after: float | None
    steps: int
    seconds: float

    def __repr__(self) -> str:
        return f"<Healed: {self.steps:,} steps in {self.seconds:.1f} s; {self.reason}>"

    def _repr_html_(self) -> str:
        rows = [{"data": "held out", "before": self.before, "after": self.after}]
        if self.other_before is not None:
            rows.append({"data": "other domain", "before": self.other_before, "after": self.other_after})
        return f"<p>{html.escape(repr(self))}</p>{Rows(rows)._repr_html_()}"


def heal(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    objective: Objective | Callable,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    optimizer: str = "adamw",
    lr: float | None = None,
    held_out: Batches | None = None,
    other: Batches | None = None,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> Healed:
    """Trains the factors of a compressed model towards the outputs of the model that it was made of.

    The factors, the layers with fewer rows or columns, and all vectors (biases, norms) learn; dense matrices, tables,
    integers and zeros stay as they are. No labels are needed: the loss is half the squared distance to the teacher's
    output. Both run in evaluation mode. The best of 20 evaluations on held-out batches is kept, if it is nearer to the
    teacher than the model that was given, and not farther on data of another domain.

    Args:
        model: from `plan.apply()`; left as it is.
        teacher: the model that it was made of; left as it is.
        batches: to learn from. Without `held_out`, an eighth of them (of few batches, of their samples) judges, as many
            as `gm.compress` measures on: with the same list, the same ones.
        objective: that of `gm.compress`; its `predict` says which output is compared.
        seconds, steps: the budget; give one. Seconds are of training alone, without the evaluations.
        optimizer: a name of `gm.optim.OPTIMIZERS`.
        lr: its learning rate; for AdamW by default 0.002 times the root mean square entry of the matrices that learn.
            It rises over ten steps and falls linearly to zero.
        held_out: batches that judge.
        other: batches of a second domain, on which the model must not become worse.
        seed: of the order of the batches.
        progress: called after each evaluation with the share of the budget that is spent, and the distance.

    Returns:
        The better model, with the distances before and after.

    Raises:
        InputError: not one budget, no learning rate for the optimizer, too little data to hold some out, or nothing
            that could learn.
        TaskError: as `gm.train`.

    Cost: for each step a forward pass of the teacher, and one with a backward pass of the model; and 20 evaluations of
    the held-out batches. Memory: a copy of the model, and the optimizer's state of what learns.
    Source: distillation (Hinton et al. 1503.02531) of the outputs themselves.

    >>> import gramian as gm
    >>> x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    >>> net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    >>> plan = gm.compress(net, batches=[x], objective=gm.Objective.self_distillation(), keep=0.5)
    >>> healed = gm.heal(plan.apply(), net, [x], gm.Objective.self_distillation(), steps=50)
    >>> healed.kept, healed.after < healed.before
    (True, True)
    """
    if lr is None and optimizer != "adamw":
        raise InputError(f"heal: give lr= for {optimizer!r}; there is one by default for adamw")
    if (seconds is None) == (steps is None):
        raise InputError("heal: give one budget, seconds= or steps=, as in gm.heal(…, seconds=60)")
    for budget, amount in (("seconds", seconds), ("steps", steps)):
        if amount is not None and not amount > 0:
            raise InputError(f"heal: {budget} must be positive, got {amount!r}")
    small, teacher = pair_of(model, teacher, "heal")
    given, judges = _parted(batches, held_out)
    second = None if other is None else list(as_batches(other, "heal"))
    named = as_objective(objective)
    base = named if named.against is not None else around_output(named)
    assert base.against is not None
    target = base.against(teacher)

    def distance(one: nn.Module, data: Sequence[Any]) -> float:
        with evaluating(teacher):
            found = losses_of(one, Measure(list(data), target))
        return sum(loss for loss, _ in found) / sum(units for _, units in found)

    def predict(one: nn.Module, batch: Any) -> Any:
        with evaluating(one), evaluating(teacher):
            return target.predict(one, batch)

    def epoch(number: int, generator: torch.Generator) -> list[Any]:
        return [given[i] for i in torch.randperm(len(given), generator=generator).tolist()]

    def told(row: dict[str, float], share: float) -> None:
        if progress is not None:
            progress(share, row["distance"])

    with naming_the_layer("heal", judges[0], named, small, teacher):
        before = distance(model, judges)
    other_before = None if second is None else distance(model, second)
    wanted, modes = {p: p.requires_grad for p in small.parameters()}, {m: m.training for m in small.modules()}
    small.requires_grad_(False)
    learning = list(_learning(small))
    if not learning:
        raise InputError("heal: nothing can learn: no layer is factored or narrowed, and there are no vectors")
    for parameter in learning:
        parameter.requires_grad_(True)
    task = Task(lambda: small, replace(target, predict=predict), epoch, lambda one: {"distance": distance(one, judges)})
    run = train(
        task,
        optimizer=optimizer,
        lr=_rate(learning) if lr is None else lr,
        seconds=seconds,
        steps=steps,
        best="min:distance",
        seed=seed,
        progress=told,
    )
    for parameter, flag in wanted.items():
        parameter.requires_grad_(flag)
    for module, mode in modes.items():
        module.training = mode
    after, other_after = distance(run.model, judges), None if second is None else distance(run.model, second)
    reason = _reason(run, before, after, other_before, other_after)
    kept = not reason
    reason = reason or f"kept: the held-out {DISTANCE} fell from {before:.4g} to {after:.4g}"
    best = run.model if kept else model
    return Healed(best, kept, reason, before, after, other_before, other_after, run.steps, run.seconds)


def _parted(batches: Batches, held_out: Batches | None) -> tuple[list[Any], list[Any]]:
    """The batches to learn from, and those that judge."""
    if held_out is not None:
        given, judges = list(as_batches(batches, "heal")), list(as_batches(held_out, "heal"))
    else:
        reader = Reader(batches, verb="heal")
        given = list(reader)
        judges = [batch for _, batch in reader.held]
    if not given:
        raise no_batches(batches, "heal")
    if not judges:
        raise InputError("heal: too few samples to hold some out. Give held_out=, or more batches")
    return given, judges


def _learning(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of what was compressed, and vectors."""
    changed = [m for m in model.modules() if isinstance(m, LowRank) or SLICED in vars(m)]
    of_changed = {id(p) for m in changed for p in m.parameters()}
    return (p for p in model.parameters() if p.is_floating_point() and (p.ndim < 2 or id(p) in of_changed))


def _rate(learning: Sequence[nn.Parameter]) -> float:
    matrices = [p.detach().double().square() for p in learning if p.ndim > 1] or [torch.ones(1)]
    return RELATIVE * float(sum(m.sum() for m in matrices) / sum(m.numel() for m in matrices)) ** 0.5


def _reason(run: Run, before: float, after: float, other_before: float | None, other_after: float | None) -> str:
    """Why a healed model is not kept; empty where it is."""
    if run.diverged or not math.isfinite(after):
        return "not kept: the loss stopped being finite; a smaller lr may help"
    if not after < before:
        return f"not kept: the held-out {DISTANCE} did not fall ({before:.4g}, then {after:.4g})"
    if other_before is not None and other_after is not None and not other_after <= other_before:
        return f"not kept: on the other domain the {DISTANCE} rose from {other_before:.4g} to {other_after:.4g}"
    return ""
