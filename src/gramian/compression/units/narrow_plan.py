"""The plan of a narrower model: units in the order in which they go, and how many of each layer one budget keeps."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gramian.compression.budget.points import Point
from gramian.compression.budget.predicting import Predicted, Rises
from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.layers.modules import copied, submodule
from gramian.compression.storage.files import pretrained_support
from gramian.compression.units.cutting import compensate_, cut_
from gramian.compression.units.flow import Units
from gramian.errors import InputError, some
from gramian.report.figures import figures_by_layer
from gramian.rows import Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NarrowPlan", "Narrowed"]


@dataclass(frozen=True, eq=False)
class Narrowed:
    """The units of one layer, and what removing them costs.

    Args:
        units: which they are.
        order: the first to go first.
        spectrum: what each column takes with it, the last to go first.
        numbers: attributes of other modules that go down with the units, by module: their value for all units.
        price: parameters of one unit while all others are there.
    """

    units: Units
    order: tuple[int, ...]
    spectrum: WeightedSVD
    numbers: dict[str, dict[str, int]]
    price: int

    @property
    def columns(self) -> int:
        """Of the matrix, for each unit."""
        return len(self.spectrum.values) // self.units.num

    @cached_property
    def losses(self) -> list[float]:
        """What it costs to keep each number of units, from 0 on; none can be empty."""
        return (0.5 * self.spectrum.candidates.losses[:: self.columns]).tolist()

    @cached_property
    def steps(self) -> list[tuple[float, int]]:
        """The hull's corners but the last: loss saved for each unit of the step to the next, and units kept."""
        losses, num = self.losses, self.units.num
        found: list[int] = []
        for kept in range(1, num + 1):
            while len(found) > 1 and _slope(losses, found[-2], found[-1]) <= _slope(losses, found[-1], kept):
                found.pop()
            found.append(kept)
        return [(_slope(losses, a, b) / self.price, a) for a, b in pairwise(found)]


def _slope(losses: Sequence[float], a: int, b: int) -> float:
    return (losses[a] - losses[b]) / (b - a)


@dataclass(frozen=True, eq=False, repr=False)
class NarrowPlan:
    """How many heads, hidden units and channels each layer keeps, at one budget for the whole model.

    `plan.at(keep=0.6)` gives a plan for another budget; `plan.apply()` gives the smaller model, of the same classes
    (torch's attention becomes a `NarrowAttention`).

    Args:
        model: a copy of the model as it came.
        layers: units that can be removed.
        keep: share of the parameters.
        kept: by layer, the number of its units.
        reasons: by layer, why nothing of its input is removed.
        notes: what a person has to know of the calibration.
        rises: where the rise of the loss was measured.
    """

    model: nn.Module
    layers: tuple[Narrowed, ...]
    keep: float
    kept: dict[str, int]
    reasons: dict[str, str]
    notes: tuple[str, ...] = ()
    rises: Rises = field(default_factory=Rises)

    def __str__(self) -> str:
        text = f"keep = {self.keep:.3f}: {self.parameters:,} of {self.parameters_dense:,} parameters"
        return f"{text} ({'; '.join(self.notes)})" if self.notes else text

    def __repr__(self) -> str:
        return f"NarrowPlan({self})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.explain()._repr_html_()}"

    def explain(self) -> Rows:
        """One row for each layer: its name, units before and after, the layers that produce them, loss, and reason."""
        rows = [
            {
                "name": layer.units.name,
                "units": layer.units.num,
                "kept": self.kept[layer.units.name],
                "from": ", ".join(dict.fromkeys(part.name for part in layer.units.parts)),
                "loss": layer.losses[self.kept[layer.units.name]],
                "reason": "",
            }
            for layer in self.layers
        ]
        none = {"units": None, "kept": None, "from": "", "loss": 0.0}
        return Rows(rows + [{"name": name, **none, "reason": reason} for name, reason in self.reasons.items()])

    def figures(self) -> dict[str, Figure]:
        """Return pictures by layer as matplotlib's figures, by title, to change or to save (`figure.savefig`)."""
        rows = [row for row in self.explain() if row["units"]]
        return figures_by_layer(
            "Plan",
            str(self),
            [row["name"] for row in rows],
            Share_kept=[row["kept"] / row["units"] for row in rows],
            Part_of_the_estimated_rise_of_the_loss=[row["loss"] for row in rows],
        )

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that lose rows or columns."""
        names = (name for layer in self.layers for name in (layer.units.name, *(p.name for p in layer.units.parts)))
        return tuple(dict.fromkeys(names))

    @cached_property
    def parameters_dense(self) -> int:
        """Parameters of the model as it came."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def parameters(self) -> int:
        """Parameters of the model that `apply()` gives."""
        return self._parameters(self.kept)

    def saved(self, name: str) -> int:
        """Parameters that the units removed from one layer's input save by themselves.

        Args:
            name: of the layer.
        """
        alone = {layer.units.name: layer.units.num for layer in self.layers} | {name: self.kept[name]}
        return self.parameters_dense - self._parameters(alone)

    def _parameters(self, kept: dict[str, int]) -> int:
        total = 0
        for parameter, cuts in self._cut_parameters:
            numel = parameter.numel()
            for layer in cuts:
                numel = numel * kept[layer.units.name] // layer.units.num
            total += numel - parameter.numel()
        return self.parameters_dense + total

    @cached_property
    def _cut_parameters(self) -> list[tuple[Tensor, list[Narrowed]]]:
        """Each parameter with the layers whose units cut it: one along its rows, one along its columns."""
        by_module: dict[str, tuple[list[Narrowed], list[Narrowed]]] = {}
        for layer in self.layers:
            by_module.setdefault(layer.units.name, ([], []))[1].append(layer)
            for name in dict.fromkeys(part.name for part in layer.units.parts):
                by_module.setdefault(name, ([], []))[0].append(layer)
        found = []
        for name, (rows, columns) in by_module.items():
            module = submodule(self.model, name)
            for local, parameter in module.named_parameters(recurse=False):
                found.append((parameter, rows + (columns if local == "weight" else [])))
        return found

    @property
    def predicted_loss(self) -> float:
        """The rise of the mean loss to second order."""
        return sum(layer.losses[self.kept[layer.units.name]] for layer in self.layers)

    @property
    def predicted(self) -> Predicted:
        """The rise of the mean loss that is expected, with an interval, from the points where it was measured."""
        return self.rises.at(self, True)

    @property
    def smallest(self) -> float:
        """The smallest possible share of the parameters: one unit in each layer that can be narrowed."""
        least = self._parameters({layer.units.name: 1 for layer in self.layers})
        return min(1.0, math.nextafter(least / self.parameters_dense, 1.0))

    @property
    def points(self) -> tuple[Point, ...]:
        """Where the rise of the loss was measured."""
        return self.rises.of(self, True)

    def settled(self) -> NarrowPlan:
        """The same with the rise at the smallest share measured, which otherwise is when it is asked for."""
        for plan in (self, self.at(self.smallest)):
            _ = plan.predicted
        return replace(self, rises=replace(self.rises, measure=None))

    def at(self, keep: float) -> NarrowPlan:
        """The plan that keeps a share of the parameters.

        Args:
            keep: `0 < keep ≤ 1`. Units of all layers stand in one list, by the loss that each saves for each parameter
                that it costs; every layer keeps at least one.

        Raises:
            InputError: the share is out of range, or below what is possible.
        """
        if not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise InputError(f"narrow: keep must be a share in (0, 1], got {keep!r}")
        if keep < self.smallest:
            raise InputError(
                f"narrow: keep={keep} is below the smallest possible share of the parameters, {self.smallest:.3f}, "
                f"which leaves one unit in each layer that can be narrowed{self.left_dense()}"
            )
        steps = sorted(((worth, i, kept) for i, layer in enumerate(self.layers) for worth, kept in layer.steps))
        kept = {layer.units.name: layer.units.num for layer in self.layers}
        budget = int(keep * self.parameters_dense + 1e-6)
        for _, i, fewer in steps:
            if self._parameters(kept) <= budget:
                break
            name = self.layers[i].units.name
            # Of a step of several units, which all save the same, no more than needed.
            while kept[name] > fewer and self._parameters(kept) > budget:
                kept[name] -= 1
        for _, i, _ in reversed(steps):  # a head may have been more than was needed
            name, num = self.layers[i].units.name, self.layers[i].units.num
            while kept[name] < num and self._parameters({**kept, name: kept[name] + 1}) <= budget:
                kept[name] += 1
        return replace(self, keep=keep, kept=kept)

    def left_dense(self) -> str:
        """The layers of which nothing is removed, the first few, for an error."""
        told = some((f"{name} ({why})" for name, why in self.reasons.items()), separator="; ")
        return f" (not narrowed: {told})" if told else ""

    def apply(self) -> nn.Module:
        """A copy of the model without the units that go. The plan, and the model it was made of, stay."""
        model = copied(self.model)
        cut = [(layer, self.kept[layer.units.name]) for layer in self.layers]
        cut = [(layer, num) for layer, num in cut if num < layer.units.num]
        for layer, num in cut:
            compensate_(model, layer.spectrum, num * layer.columns)
        for layer, num in cut:
            stay = torch.tensor(layer.order[len(layer.order) - num :]).sort().values
            cut_(model, layer.units, stay, layer.numbers)
        support = pretrained_support()
        if support is not None:
            support.attach(model)
        return model
