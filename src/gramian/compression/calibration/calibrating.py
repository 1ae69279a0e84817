"""Calibration: the statistics that a plan rests on, and what can be wrong with the data they are of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gramian import placement
from gramian.batch import tensors
from gramian.calls import prepared
from gramian.compression.calibration.measure import Measure
from gramian.compression.calibration.reading import MOST_FOLDED, MOST_SEEN, Reader
from gramian.errors import InputError
from gramian.gram import Gram
from gramian.loader import Batches, no_batches
from gramian.objective import Objective, as_objective
from gramian.recording import capture, evaluating
from gramian.recording.collective import Collective, collective_of
from gramian.recording.hooks import hooks
from gramian.recording.onepass import captured
from gramian.recording.recorder import WITHOUT_AUTOGRAD
from gramian.site import Site
from gramian.statistics import Statistics

__all__ = ["Calibration", "around_output", "calibrate", "draws_for"]

ENOUGH, ROWS, EVERY = 8, 32, 4
"""From so many batches, and so many rows for each dimension of every G on, one batch of so many is differentiated. A
decides how a layer is cut, and G only what it counts, so that G may have fewer rows; a backward pass with its Grams
takes half of the time."""
VANISHES = (
    "the gradient of the loss is zero at this model, as that of a distance to its own output is: layers are "
    "weighted by how much they move the model's output instead (labels drawn around it, fisher='sampled')"
)
MOST_DRAWS = 8
"""How often labels are drawn for a batch, at most, where there are too few batches for so many rows."""


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
        ranks: which processes made it together.
        latest: what was computed of the last layer's inputs, which the next one may share.
    """

    stats: Statistics
    distinct: float = 1.0
    samples: float = 0.0
    differentiated: float = 1.0
    objective: Objective | None = None
    measure: Measure | None = None
    notes: list[str] = field(default_factory=list)
    ranks: Collective | None = None
    latest: dict[Any, Any] = field(default_factory=dict, repr=False)


def calibrate(
    model: nn.Module,
    batches: Batches,
    objective: Objective | Callable,
    asked: Collection[str] | None = None,
    held_out: Batches | None = None,
    trained_on: int | None = None,
) -> Calibration:
    """Captures statistics on most of the batches, keeps some to measure on, and looks at the data meanwhile.

    Args:
        model: dense; left as it was.
        batches: read once.
        objective: its gradients give G. Where they vanish, as those of a distance to the model's own output do, G is
            that of labels drawn around its output.
        asked: the parameters whose G has to have many rows; by default all.
        held_out: what to measure on, in place of some of the batches.
        trained_on: how many samples the model was trained on, those of the batches among them, where that is known.

    Under DDP all ranks call this together, each with its own batches, and have the same result. Rank r of n has the
    batches r, n + r, 2 n + r, … of one process, and the same of these are kept to measure on, by every rank.

    Raises:
        InputError: as `gm.capture`.
    """
    objective = as_objective(objective)
    ranks = collective_of(model)
    labels = 0 if objective.divergence is None else MOST_SEEN if trained_on is None else MOST_FOLDED
    reader = Reader(batches, ranks, held_out=held_out, labels=labels)
    given = iter(reader)
    with _together(ranks):
        first = next(given, None)
        if first is None and not ranks.together:
            raise no_batches(batches, "compress")
    firsts = [] if first is None else [first]
    notes: list[str] = []
    used, stats = objective, capture(model, firsts, objective)
    if _vanishes(model, objective, firsts, stats):
        used = around_output(objective)
        stats = capture(model, firsts, used)
        notes.append(VANISHES)
    drawn = redrawn(used, _draws(stats, used, reader, asked))
    rank = placement.world(ranks.group).rank if ranks.together else 0
    generator = torch.Generator(next((p.device for p in model.parameters()), "cpu")).manual_seed(1 + rank)
    with _together(ranks):
        second = next(given, None)
    which = None if ranks.together else _Differentiated(asked)
    if drawn is not used or (second is not None if which else placement.any_rank(second is not None, ranks.group)):
        del stats  # so that the second moments are in memory once; the first batch is looked at again
        every = itertools.chain(firsts, [] if second is None else [second], given)
        stats = captured(model, every, drawn, generator=generator, differentiates=which)
    held, distinct, samples = reader.shared(first)
    seen, more = held[0][0] < 0, reader.others()
    judges = [batch for _, batch in held]
    measure = Measure(judges, objective, seen, [] if seen else more, held_out is not None, trained_on)
    share = 1.0 if which is None else which.share
    return Calibration(stats, distinct, samples, share, used, measure, notes, ranks)


def _draws(stats: Statistics, objective: Objective, reader: Reader, asked: Collection[str] | None) -> int:
    """How often labels are drawn for each batch, so that every G has ROWS rows for each dimension, given the first one.

    A label says nothing of most directions of the output, and a loss that pools over tokens has one for all of them. So
    few samples have a poor G, and it costs no data to draw again.
    """
    if objective.fisher != "sampled" or not reader.total:
        return 1
    sides = [
        (site.G.dim, float(site.A.count.max()) * reader.total / reader.size)
        for site in _sites(stats, asked)
        if isinstance(site.G, Gram) and site.A is not None
    ]
    return max((draws_for(objective, dim, rows) for dim, rows in sides), default=1)


def draws_for(objective: Objective, dim: int, rows: float) -> int:
    """How often labels are drawn, so that a G of so many dimensions has ROWS rows for each.

    Args:
        objective: whose labels they are.
        dim: of G.
        rows: of the layer's outputs, if labels are drawn once.
    """
    if objective.fisher != "sampled":
        return 1
    return max(1, min(MOST_DRAWS, round(ROWS * dim / max(rows, 1.0))))


def redrawn(objective: Objective, times: int) -> Objective:
    """The objective with labels drawn several times for each output: the same G in expectation, with less noise.

    Args:
        objective: with labels to draw.
        times: at least 1.
    """
    once = objective.sampled
    if times == 1 or once is None:
        return objective

    def sampled(output: Any, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        for _ in range(times):
            yield from (loss / times**0.5 for loss in once(output, batch, generator))

    return replace(objective, sampled=sampled)


def _sites(stats: Statistics, asked: Collection[str] | None) -> Iterator[Site]:
    for name, sites in stats.blocks.items():
        if asked is None or name in asked:
            yield from sites


class _Differentiated:
    """Whether a batch is differentiated: all are until every G has many rows, and then one of EVERY."""

    def __init__(self, asked: Collection[str] | None) -> None:
        self.asked = asked
        self.num = self.taken = 0

    @property
    def share(self) -> float:
        """The share of batches that were; all where it was not asked."""
        return self.taken / self.num if self.num else 1.0

    def __call__(self, stats: Statistics) -> bool:
        new = self.taken < ENOUGH
        taken = not stats.units or self.num % EVERY == 0 or any(_lacks_rows(s, new) for s in _sites(stats, self.asked))
        self.num, self.taken = self.num + 1, self.taken + taken
        return taken


def _lacks_rows(site: Site, new: bool) -> bool:
    if site.G is None or site.A is None:  # no gradient may ever come, as to a pooler whose output nobody asks for
        return new and (not site.reason or site.reason in WITHOUT_AUTOGRAD)
    return isinstance(site.G, Gram) and float(site.A.count.max()) < ROWS * site.G.dim


def around_output(objective: Objective) -> Objective:
    """The objective of the model's own output, whatever the objective makes of it: what the model returned when called.

    Args:
        objective: whose `predict` calls the model.
    """

    def predict(model: nn.Module, batch: Any) -> Any:
        returned: list[Any] = []
        with hooks([model.register_forward_hook(lambda module, args, output: returned.append(output))]):
            objective.predict(model, batch)
        found = [one for one in returned if any(t.requires_grad for t in tensors(one))] or returned
        if not found:
            raise InputError(
                "compress: the gradient of the loss is zero at this model, and the objective does not call the model "
                "as a whole. Give objective=gm.Objective.self_distillation(predict=lambda model, batch: …)"
            )
        return found[-1]

    return replace(Objective.self_distillation(predict=predict), rows=objective.rows)


def _vanishes(model: nn.Module, objective: Objective, batches: list[Any], stats: Statistics) -> bool:
    """Whether the gradients are zero, or rounding beside those of the model's own output."""
    size = _gradient(stats)
    if size == 0.0:
        return True
    if objective.fisher != "empirical":
        return False
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes) if dtypes else 0.0
    own, ranks = around_output(objective), collective_of(model)
    square, num = 0.0, 0
    try:
        reference = capture(model, batches, own)
        with _together(ranks), evaluating(ranks.model), torch.no_grad():
            for batch in batches:
                for one, _ in own.predict(ranks.model, prepared(ranks.model, batch)):
                    square, num = square + float(one.double().square().sum()), num + one.numel()
    except InputError:  # it has no output that can be seen: the gradient that there is has to do
        return False
    each = placement.exchange_json((square, num), ranks.group) if ranks.together else [(square, num)]
    level = sum(one for one, _ in each) / sum(one for _, one in each)
    # As large as that of an output that is off by rounding. bfloat16 rounds by a percent, which is no rounding here.
    return size < (16 * min(eps, 1e-3)) ** 2 * level * _gradient(reference)


def _together(ranks: Collective) -> Any:
    """A context: under DDP an error on one rank is raised on all."""
    return placement.agreed("compress", ranks.group) if ranks.together else nullcontext()


def _gradient(stats: Statistics) -> float:
    return math.fsum(float(site.G.diagonal.sum()) for site in stats.sites() if site.G is not None)
