"""Which layers keep how many ranks: one budget of parameters for the whole model."""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import nn

from gramian.calls import as_model, unwrapped
from gramian.compression.calibrating import Calibration, Measure, calibrate
from gramian.compression.correcting import corrected
from gramian.compression.files import pretrained_support
from gramian.compression.filling import fill, uniform
from gramian.compression.lowrank import LowRank, matrix_of
from gramian.compression.modules import copied, replaced, submodule
from gramian.compression.predicting import Point, Predicted, losses_of, measured_point, predict
from gramian.compression.targets import targets
from gramian.compression.weighted import WeightedSVD, decompose, site_of
from gramian.errors import GramianWarning, InputError, some
from gramian.loader import Batches, as_batches
from gramian.objective import Objective, as_objective
from gramian.rows import Rows
from gramian.statistics import Statistics

__all__ = ["Plan", "compress"]

DEFAULT_KEEP = 0.5
REMOVED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
"""Shares of the layers that can be factored, at whose removal the rise of the loss is measured."""
VARIED = 1e-6
"""The least share of variance in the second moment of inputs; below it there is little but float32's rounding."""
FEW_UNITS = 16
"""Below so many distinct units of the loss, G says nothing of which layers matter, and every layer loses one share."""


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """How many ranks each layer keeps at a share `keep` of the parameters.

    `plan.at(keep=…)` gives another share without new decompositions; `plan.apply()` gives the smaller model. A plan has
    a copy of the model, so that training the model on does not change it.

    Args:
        model: a copy of the model as it came.
        spectra: the weighted singular value decomposition of each layer that can be factored.
        keep: share of the parameters counted by `of`; where none was asked for, one half, or the smallest possible.
        ranks: by layer (the module's name), a rank, or `None` where the layer stays as it is.
        reasons: by layer, why it is not factored at any share.
        of: what `keep` is a share of: "all" parameters, or those of the "factorable" layers' weights.
        notes: what a person has to know of the calibration and of the share, in sentences.
        ranked: whether the statistics tell which layers matter; if not, each loses the same share.
        points: where the rise of the loss was measured.
    """

    model: nn.Module
    spectra: tuple[WeightedSVD, ...]
    keep: float
    ranks: dict[str, int | None]
    reasons: dict[str, str]
    of: Literal["all", "factorable"] = "all"
    notes: tuple[str, ...] = ()
    ranked: bool = True
    points: tuple[Point, ...] = ()

    def __str__(self) -> str:
        factored = sum(rank is not None for rank in self.ranks.values())
        what = f"{self.parameters:,} of {self.parameters_dense:,} parameters, {factored} layers factored"
        text = f"keep = {self.keep:.3f}{'' if self.of == 'all' else ' of the factorable ones'}: {what}"
        return f"{text} ({'; '.join(self.notes)})" if self.notes else text

    def __repr__(self) -> str:
        return f"Plan({self})"  # the matrices of all layers would fill pages

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.explain()._repr_html_()}"

    def explain(self) -> Rows:
        """One row for each layer with a matrix: its name, shape, rank, share of parameters kept, loss, and the reason.

        The loss is the second-order estimate of the layer's part of the rise. The reason says why a layer stays as it
        is, or that the diagonal alone of a wide side is known.
        """
        rows = []
        for s in self.spectra:
            rank = self.ranks[s.name]
            kept = 1.0 if rank is None else rank * sum(s.shape) / s.dense
            loss = 0.0 if rank is None else 0.5 * float(s.candidates.losses[rank])
            why = "worth its parameters" if rank is None else ""
            why = "; ".join(filter(None, [why, *(f"{side} weighted by their diagonal alone" for side in s.diagonal)]))
            rows.append({"name": s.name, "shape": s.shape, "rank": rank, "kept": kept, "loss": loss, "reason": why})
        dense = {"shape": None, "rank": None, "kept": 1.0, "loss": 0.0}
        return Rows(rows + [{"name": name, **dense, "reason": reason} for name, reason in self.reasons.items()])

    @cached_property
    def parameters_dense(self) -> int:
        """Parameters of the model as it came."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def parameters_factorable(self) -> int:
        """Parameters of the weights that can be factored."""
        return sum(s.dense for s in self.spectra)

    @property
    def parameters(self) -> int:
        """Parameters of the model that `apply()` gives."""
        saved = 0
        for s in self.spectra:
            rank = self.ranks[s.name]
            saved += 0 if rank is None else s.dense - rank * sum(s.shape)
        return self.parameters_dense - saved

    @property
    def predicted_loss(self) -> float:
        """The rise of the mean loss that the dropped singular values stand for, to second order: `½ Σ σ²`.

        It leaves out how the errors of layers add up, and is often several times too low; see `predicted`.
        """
        ranks = [(s, self.ranks[s.name]) for s in self.spectra]
        return 0.5 * float(sum(float(s.values[rank:].square().sum()) for s, rank in ranks if rank is not None))

    @property
    def predicted(self) -> Predicted:
        """The rise of the mean loss that is expected, with an interval, from the points where it was measured."""
        return predict(self.predicted_loss, self.points)

    def at(self, *, keep: float, of: Literal["all", "factorable"] | None = None) -> Plan:
        """The plan at another share of the parameters, `0 < keep ≤ 1`.

        Singular values of all layers stand in one list, by `σ²` for each parameter that they cost, and are taken from
        the top until the budget is spent. Every layer keeps at least rank 1. A layer goes from the rank where that is
        worth it straight to dense.

        Args:
            keep: the share.
            of: what it is a share of, as in `compress`; by default as this plan has it.

        Raises:
            InputError: `keep` is out of range, or below what rank 1 everywhere needs.
        """
        of = of or self.of
        if of not in ("all", "factorable"):
            raise InputError(f"compress: of must be 'all' or 'factorable', got {of!r}")
        if not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise InputError(f"compress: keep must be a share in (0, 1], got {keep!r}")
        total, fixed = self._counted(of)
        least = sum(sum(s.shape) for s in self.spectra) + fixed
        if least > keep * total:
            raise InputError(
                f"compress: keep={keep} of {total:,} parameters is {int(keep * total):,}, but rank 1 everywhere needs "
                f"{least:,}{self._dense()}; the smallest possible keep is {least / total:.3f}"
            )
        layers = [s.candidates for s in self.spectra]
        budget = int(keep * total) - fixed
        ranks = fill(layers, budget) if self.ranked else uniform(layers, budget)
        by_name = {s.name: rank for s, rank in zip(self.spectra, ranks, strict=True)}
        notes = tuple(note for note in self.notes if _SMALLEST not in note)
        return replace(self, keep=keep, of=of, ranks=by_name, notes=notes)

    @property
    def smallest(self) -> float:
        """The smallest possible share: rank 1 everywhere."""
        total, fixed = self._counted(self.of)
        least = (sum(sum(s.shape) for s in self.spectra) + fixed) / total
        return min(1.0, math.nextafter(least, 1.0))  # whose budget is not below it by rounding

    def _counted(self, of: str) -> tuple[int, int]:
        """The parameters that a share is of, and how many of those stay in any case."""
        if of == "factorable":
            return self.parameters_factorable, 0
        return self.parameters_dense, self.parameters_dense - self.parameters_factorable

    def _dense(self) -> str:
        """The layers that are not factored, the first few, for an error."""
        shown = some((f"{name} ({why})" for name, why in self.reasons.items()), separator="; ")
        return f" (not factored: {shown})" if shown else ""

    def apply(self) -> nn.Module:
        """A copy of the model with the planned layers factored. The plan, and the model that it was made of, stay."""
        model = copied(self.model)
        for s in self.spectra:
            rank = self.ranks[s.name]
            if rank is None:
                continue
            layer = submodule(model, s.name)
            low = LowRank(layer, rank)
            left, right = s.left[:, :rank], s.right[:rank]
            bias: Any = getattr(layer, "bias", None)
            if bias is not None and s.mean is not None:
                bias = bias + (matrix_of(layer).double() - left @ right) @ s.mean
            low.set_(left, right, bias)
            model = replaced(model, s.name, low)
        support = pretrained_support()
        if support is not None:
            support.attach(model)
        return model


_SMALLEST = "is the smallest possible share"


def compress(
    model: nn.Module,
    stats: Statistics | None = None,
    *,
    batches: Batches | None = None,
    objective: Objective | Callable | None = None,
    keep: float | None = None,
    of: Literal["all", "factorable"] = "all",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Factors every linear layer and convolution so that the loss grows least for the parameters kept.

    Each layer is cut where its output error, weighted by the loss's curvature, is least: the SVD of `G^½ W A^½`, with A
    the covariance of the layer's inputs (its bias takes up what the mean input loses) and G the second moment of its
    output gradients, both shrunk as far as their number of rows asks for. So weighted, the squared singular values of
    all layers are in one unit, the loss, and one budget is filled from one list. Where labels can be drawn from the
    model's output, each layer's estimate is scaled to what the gradients of its weight say on the batches kept apart.

    What the calibration lacks is warned of and stands in `plan.notes`: too few or constant samples to tell which layers
    matter (then each loses the same share), a loss whose gradient vanishes.

    Args:
        model: left untouched; the plan has a copy. Layers that are factored already are cut further.
        stats: from `gm.capture`, best with `fisher="gauss_newton"`; or give `batches` and `objective`.
        batches: as in `gm.capture`, in place of `stats`; they are read once, and an eighth is kept to measure the rise
            of the loss on. With `stats`, all of them (a list) are for measuring.
        objective: how they are turned into a loss; `gm.Objective.self_distillation()` where there are no labels.
        keep: share of the parameters to keep. By default 0.5, or where rank 1 everywhere needs more than that, the
            smallest possible share, which the plan's text says.
        of: what `keep` is a share of: "all" parameters of the model, or those of the "factorable" layers' weights.
        include: name patterns (`"encoder.*"`): only layers that match one are factored.
        exclude: name patterns of layers that stay as they are.
        progress: called with the number of layers done.

    Returns:
        A plan; `plan.at(keep=0.3).apply()`. A wrapper around the whole model (`torch.compile`, `DataParallel`) is left
        out of it.

    Raises:
        InputError: there are no statistics, they are not finite, a pattern matches no layer, or no layer can be
            factored.

    Cost: three eigendecompositions in float64 for each layer; 48 backward passes and eight evaluations of the batches
    kept apart.
    Source: whitening by A: SVD-LLM (2403.07378), §3.1; by both sides: Fisher-weighted SVD (2207.00112) with Kronecker
    factors; shrinkage: Ledoit & Wolf (Bernoulli 28, 2022).

    >>> import torch
    >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)), torch.cat([torch.eye(16), -torch.eye(16)])
    >>> plan = compress(net, batches=[(x, x[:, :2])], objective=Objective.regression(), keep=0.6)
    >>> plan.ranks["0"] < 8, plan.parameters <= 0.6 * plan.parameters_dense
    (True, True)
    """
    model = as_model(model, "compress")
    if isinstance(include, str) or isinstance(exclude, str):
        raise InputError("compress: include and exclude are lists of patterns: exclude=['lm_head']")
    plain = unwrapped(model)
    found, reasons = targets(plain, include, exclude)  # before any data is read
    if not found:
        raise _nothing(plain, reasons)
    if stats is not None:
        calibration = Calibration(stats, samples=stats.units)
        if batches is not None and objective is not None:
            calibration.measure = Measure(list(as_batches(batches, "compress")), _measured_by(objective, plain))
    elif batches is None or objective is None:
        raise InputError("compress: give stats from gm.capture, or both batches= and objective=")
    else:
        calibration = calibrate(model, batches, objective)
    notes, ranked, blind = _judged(calibration)
    spectra: list[WeightedSVD] = []
    own = copied(plain)
    for target in found:
        try:
            site = site_of(target, calibration.stats)
        except InputError as error:
            reasons[target.name] = str(error)
            continue
        here = target._replace(module=submodule(own, target.name))
        spectra.append(decompose(here, site, share=calibration.distinct, blind=blind))
        if progress is not None:
            progress(len(spectra))
    if not spectra:
        raise _nothing(plain, reasons)
    if ranked and calibration.objective is not None and calibration.measure is not None:
        spectra = list(corrected(own, spectra, calibration.measure.batches, calibration.objective))
    for note in notes:
        warnings.warn(f"compress: {note}", GramianWarning, stacklevel=2)
    empty: dict[str, int | None] = {s.name: None for s in spectra}
    plan = Plan(own, tuple(spectra), 1.0, empty, reasons, of, tuple(notes), ranked)
    plan = replace(plan, points=_measured(plan, calibration.measure))
    if calibration.measure is not None and calibration.measure.seen:
        few = "the rise of the loss was measured on the calibration batch itself, which flatters it"
        plan = replace(plan, notes=(*plan.notes, few))
    if keep is not None:
        return plan.at(keep=keep)
    return _by_default(plan)


def _nothing(model: nn.Module, reasons: dict[str, str]) -> InputError:
    why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:20])
    return InputError(f"compress: no layer of {type(model).__name__} can be factored ({why or 'it has no matrices'})")


def _measured_by(objective: Objective | Callable, model: nn.Module) -> Objective:
    made = as_objective(objective)
    return made.against(model) if made.against else made


def _judged(calibration: Calibration) -> tuple[list[str], bool, bool]:
    """What is wrong with the data; whether it tells which layers matter; whether G is to be left out."""
    notes, stats = list(calibration.notes), calibration.stats
    units = stats.units * calibration.distinct or math.inf  # Grams from elsewhere have no units
    sites = [site for site in stats.sites() if site.A is not None and site.G is not None]
    flat = not any(bool(site.G.diagonal.any()) for site in sites if site.G is not None)
    moments = [site.A for site in sites if site.A is not None and site.op != "embedding"]
    varied = [float((a.diagonal - a.mean.square()).sum()) > VARIED * float(a.diagonal.sum()) for a in moments]
    same = bool(moments) and not any(varied)
    poor = flat or same or units < FEW_UNITS
    shared = "layers are weighted by their inputs alone, and each loses the same share"
    if flat:
        notes.append(
            f"the gradient of the loss is zero at every layer, so nothing tells which outputs matter: {shared}"
        )
    if same:
        notes.append(f"the inputs of every layer are zero, or the same for all samples: {shared}")
    elif units < FEW_UNITS:
        what = "unit" if round(units) == 1 else "units"
        notes.append(
            f"{units:.0f} distinct {what} of the loss cannot tell which layers matter, which takes {FEW_UNITS}: "
            f"{shared}"
        )
    elif calibration.distinct < 0.5:
        notes.append(f"only {calibration.samples:.0f} samples are distinct: the others count as none")
    return notes, not poor, poor


def _measured(plan: Plan, measure: Measure | None) -> tuple[Point, ...]:
    """The rise of the loss at a few shares, so that others can be predicted."""
    if measure is None or not measure.batches:
        return ()
    before = losses_of(plan.model, measure)
    points = []
    for removed in REMOVED:
        try:
            part = plan.at(keep=1 - removed, of="factorable")
        except InputError:
            break
        after = losses_of(part.apply(), measure)
        points.append(measured_point(part.predicted_loss, before, after))
    return tuple(points)


def _by_default(plan: Plan) -> Plan:
    smallest = plan.smallest
    if smallest <= DEFAULT_KEEP:
        return plan.at(keep=DEFAULT_KEEP)
    note = f"{smallest:.3f} {_SMALLEST}; {DEFAULT_KEEP} is not possible{plan._dense()}"
    made = plan.at(keep=smallest)
    return replace(made, notes=(*made.notes, note))
