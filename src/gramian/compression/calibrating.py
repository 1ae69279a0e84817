"""Calibration: the statistics that a plan rests on, and what can be wrong with the data they are of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gramian import placement
from gramian.batch import main_input, mapped, num_samples, tensors
from gramian.calls import prepared
from gramian.errors import InputError
from gramian.gram import Gram
from gramian.loader import Batches, as_batches, no_batches
from gramian.objective import Objective, as_objective
from gramian.recording import capture, evaluating
from gramian.recording.onepass import captured
from gramian.recording.recorder import WITHOUT_AUTOGRAD
from gramian.statistics import Site, Statistics

__all__ = ["Calibration", "Measure", "Reader", "around_output", "calibrate", "cuttable"]

HELD_OUT = 8
"""One batch of so many, or of few batches one sample of so many, is left out of the statistics, to measure on."""
MOST_HELD, ENOUGH_HELD = 8, 160
"""Batches kept in memory to measure on, and from how many samples on no more are."""
ENOUGH, EVERY = 8, 4
"""From so many rows for each dimension of every G on, one batch of so many is differentiated. A decides how a layer is
cut, and G only what it counts, so G needs fewer rows; a backward pass with its Grams takes half of the time."""


@dataclass
class Measure:
    """What tells how much worse a smaller model is: batches that the statistics have not seen, and a loss.

    Args:
        batches: as they came.
        objective: whose mean loss rises.
        seen: whether the statistics are of the same batches, since there were no others.
    """

    batches: list[Any]
    objective: Objective
    seen: bool = False


@dataclass
class Calibration:
    """Statistics, and what they are worth.

    Args:
        stats: of `gm.capture`.
        distinct: the share of samples that are not the same as another.
        samples: the number of distinct samples.
        differentiated: the share of batches that added to G.
        objective: whose gradients gave G; `None` where the statistics came from elsewhere.
        measure: on what the rise of the loss is measured; `None` where there is nothing.
        notes: what a person has to know of the data, in sentences.
    """

    stats: Statistics
    distinct: float = 1.0
    samples: float = 0.0
    differentiated: float = 1.0
    objective: Objective | None = None
    measure: Measure | None = None
    notes: list[str] = field(default_factory=list)


def calibrate(
    model: nn.Module, batches: Batches, objective: Objective | Callable, asked: Collection[str] | None = None
) -> Calibration:
    """Captures statistics on most of the batches, keeps some to measure on, and looks at the data meanwhile.

    Args:
        model: dense; left as it was.
        batches: read once.
        objective: its gradients give G. Where they vanish, as those of a distance to the model's own output do, G is
            that of labels drawn around its output.
        asked: the parameters whose G has to have many rows; by default all.

    Raises:
        InputError: as `gm.capture`.
    """
    objective = as_objective(objective)
    reader = Reader(batches, alone=placement.world().size == 1)
    given = iter(reader)
    first = next(given, None)
    if first is None:
        raise no_batches(batches, "compress")
    notes: list[str] = []
    if not reader.alone:
        return Calibration(capture(model, itertools.chain([first], given), objective))
    used, stats = objective, capture(model, [first], objective)
    if _vanishes(model, objective, first, stats):
        used = around_output(objective)
        stats = capture(model, [first], used)
        notes.append(
            "the gradient of the loss is zero at this model, as that of a distance to its own output is: layers are "
            "weighted by how much they move the model's output instead (labels drawn around it, fisher='sampled')"
        )
    generator = torch.Generator(next((p.device for p in model.parameters()), "cpu")).manual_seed(1)
    second, which = next(given, None), _Differentiated(asked)
    if second is not None:
        rest = itertools.chain([second], given)
        stats.merge(captured(model, rest, used, generator=generator, differentiates=which))
    measured = objective.against(model) if objective.against else objective
    held, seen = (reader.held, False) if reader.held else ([first], True)
    measure, samples = Measure(held, measured, seen), float(len(reader.hashes))
    return Calibration(stats, reader.distinct, samples, which.share, used, measure, notes)


class _Differentiated:
    """Whether a batch is differentiated: all are until every G has many rows, and then one of EVERY."""

    def __init__(self, asked: Collection[str] | None) -> None:
        self.asked = asked
        self.num = self.taken = 1  # the first one was

    @property
    def share(self) -> float:
        """The share of batches that were."""
        return self.taken / self.num

    def __call__(self, stats: Statistics) -> bool:
        new = self.taken < ENOUGH
        taken = not stats.units or self.num % EVERY == 0 or any(_lacks_rows(s, new) for s in self._sites(stats))
        self.num, self.taken = self.num + 1, self.taken + taken
        return taken

    def _sites(self, stats: Statistics) -> Iterator[Site]:
        for name, sites in stats.blocks.items():
            if self.asked is None or name in self.asked:
                yield from sites


def _lacks_rows(site: Site, new: bool) -> bool:
    if site.G is None or site.A is None:  # no gradient may ever come, as to a pooler whose output nobody asks for
        return new and (not site.reason or site.reason in WITHOUT_AUTOGRAD)
    return isinstance(site.G, Gram) and float(site.A.count.max()) < ENOUGH * site.G.dim


def around_output(objective: Objective) -> Objective:
    """The objective of the model's own output, whatever the objective makes of it: what the model returned when called.

    Args:
        objective: whose `predict` calls the model.
    """

    def predict(model: nn.Module, batch: Any) -> Any:
        returned: list[Any] = []
        handle = model.register_forward_hook(lambda module, args, output: returned.append(output))
        try:
            objective.predict(model, batch)
        finally:
            handle.remove()
        found = [one for one in returned if any(t.requires_grad for t in tensors(one))] or returned
        if not found:
            raise InputError(
                "compress: the gradient of the loss is zero at this model, and the objective does not call the model "
                "as a whole. Give objective=gm.Objective.self_distillation(predict=lambda model, batch: …)"
            )
        return found[-1]

    return replace(Objective.self_distillation(predict=predict), rows=objective.rows)


def _vanishes(model: nn.Module, objective: Objective, batch: Any, stats: Statistics) -> bool:
    """Whether the gradients are zero, or rounding beside those of the model's own output."""
    size = _gradient(stats)
    if size == 0.0:
        return True
    if objective.fisher != "empirical":
        return False
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes) if dtypes else 0.0
    own = around_output(objective)
    try:
        reference = capture(model, [batch], own)
        with evaluating(model), torch.no_grad():
            pairs = own.predict(model, prepared(model, batch))
    except InputError:  # it has no output that can be seen: the gradient that there is has to do
        return False
    level = sum(float(one.double().square().sum()) for one, _ in pairs) / sum(one.numel() for one, _ in pairs)
    # As large as that of an output that is off by rounding. bfloat16 rounds by a percent, which is no rounding here.
    return size < (16 * min(eps, 1e-3)) ** 2 * level * _gradient(reference)


def _gradient(stats: Statistics) -> float:
    return math.fsum(float(site.G.diagonal.sum()) for site in stats.sites() if site.G is not None)


class Reader:
    """Batches, less those kept to measure on, with the number of distinct samples among those given."""

    def __init__(self, batches: Batches, *, alone: bool, verb: str = "compress") -> None:
        self.batches, self.alone = as_batches(batches, verb), alone
        self.hashes: set[int] = set()
        self.num = 0
        self.held: list[Any] = []

    @property
    def distinct(self) -> float:
        """The share of samples that are not the same as an earlier one."""
        return len(self.hashes) / self.num if self.num else 1.0

    def __iter__(self) -> Iterator[Any]:
        try:
            few = len(self.batches) < HELD_OUT  # type: ignore[arg-type]
        except TypeError:
            few = False
        for i, batch in enumerate(self.batches):
            given = batch
            if self.alone and few:
                given, held = _parted(batch)
                self.held += [] if held is None else [held]
            elif self.alone and i % HELD_OUT == HELD_OUT - 1 and self._wants_more:
                self.held.append(batch)
                continue
            self._count(given)
            yield given

    @property
    def _wants_more(self) -> bool:
        return len(self.held) < MOST_HELD and sum(map(cuttable, self.held)) < ENOUGH_HELD

    def _count(self, batch: Any) -> None:
        try:
            rows = main_input(batch).detach()
            rows = rows.double() if rows.is_floating_point() else rows
            found = [hash(row.tobytes()) for row in rows.cpu().reshape(len(rows), -1).numpy()]
        except (InputError, TypeError, RuntimeError, ValueError):  # a graph, or another object: each is taken as new
            found = [hash((self.num, i)) for i in range(num_samples(batch))]
        self.hashes.update(found)
        self.num += len(found)


def _parted(batch: Any) -> tuple[Any, Any | None]:
    """A batch without its last samples, and these; whole, and `None`, where it has few or cannot be cut."""
    num = cuttable(batch)
    cut = num // HELD_OUT
    if not cut:
        return batch, None
    return mapped(batch, lambda t: t[:-cut]), mapped(batch, lambda t: t[-cut:])


def cuttable(batch: Any) -> int:
    """The number of samples of a batch whose tensors can all be cut along the first dimension; 0 of any other.

    Args:
        batch: any batch.
    """
    try:
        num = num_samples(batch)
    except InputError:
        return 0
    return num if {t.shape[0] if t.ndim else 0 for t in tensors(batch)} == {num} else 0
