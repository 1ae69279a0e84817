"""Narrowing: whole heads, hidden units and channels are removed; what is left are ordinary, smaller layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import first_samples, num_samples, tensors
from gramian.block import Block, blocks
from gramian.calls import as_model, prepared, unwrapped
from gramian.compression.calibrating import Measure, calibrate
from gramian.compression.correcting import corrected
from gramian.compression.elimination import Elimination, eliminated
from gramian.compression.feedback import feedback_of
from gramian.compression.files import pretrained_support
from gramian.compression.flow import Units, channel_dim, find_units, is_elementwise, is_near
from gramian.compression.lowrank import matrix_of
from gramian.compression.modules import clean_module_name, copied, module_name, submodule
from gramian.compression.planning import REMOVED, judged
from gramian.compression.predicting import Point, Predicted, losses_of, measured_point, predict
from gramian.compression.slicing import FEATURES, sliced_
from gramian.compression.targets import Target, adapted, by_pattern, why_not
from gramian.compression.weighted import WeightedSVD
from gramian.compression.weighting import Uncaptured, Weighting, weighting
from gramian.errors import GramianWarning, InputError, some
from gramian.layers import layer_of, layout_of, operation_of
from gramian.loader import Batches
from gramian.objective import Objective, as_objective
from gramian.recording import evaluating
from gramian.rows import Rows

__all__ = ["NarrowPlan", "narrow"]

SAMPLES = 2
"""Of the first batch, with which units are looked for."""


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

    @cached_property
    def losses(self) -> list[float]:
        """What it costs to keep each number of units, from 0 on; none can be empty."""
        size = len(self.spectrum.values) // self.units.num
        return (0.5 * self.spectrum.candidates.losses[::size]).tolist()

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

    `plan.at(keep=0.6)` gives a plan for another budget; `plan.apply()` gives the smaller model, of the same classes.

    Args:
        model: a copy of the model as it came.
        layers: units that can be removed.
        keep: share of the parameters.
        kept: by layer, the number of its units.
        reasons: by layer, why nothing of its input is removed.
        notes: what a person has to know of the calibration.
        points: where the rise of the loss was measured.
    """

    model: nn.Module
    layers: tuple[Narrowed, ...]
    keep: float
    kept: dict[str, int]
    reasons: dict[str, str]
    notes: tuple[str, ...] = ()
    points: tuple[Point, ...] = ()

    def __str__(self) -> str:
        text = f"keep = {self.keep:.3f}: {self.parameters:,} of {self.parameters_dense:,} parameters"
        return f"{text} ({'; '.join(self.notes)})" if self.notes else text

    def __repr__(self) -> str:
        return f"NarrowPlan({self})"

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

    @cached_property
    def parameters_dense(self) -> int:
        """Parameters of the model as it came."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def parameters(self) -> int:
        """Parameters of the model that `apply()` gives."""
        return self._parameters(self.kept)

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
        return predict(self.predicted_loss, self.points)

    @property
    def smallest(self) -> float:
        """The smallest possible share of the parameters: one unit everywhere."""
        least = self._parameters({layer.units.name: 1 for layer in self.layers})
        return min(1.0, math.nextafter(least / self.parameters_dense, 1.0))

    def at(self, *, keep: float) -> NarrowPlan:
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
            told = some((f"{name} ({why})" for name, why in self.reasons.items()), separator="; ")
            raise InputError(
                f"narrow: keep={keep} is below the smallest possible, {self.smallest:.3f}: one unit everywhere"
                + (f" (not narrowed: {told})" if told else "")
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

    def apply(self) -> nn.Module:
        """A copy of the model without the units that go. The plan, and the model it was made of, stay."""
        model = copied(self.model)
        cut = [(layer, self.kept[layer.units.name]) for layer in self.layers]
        cut = [(layer, num) for layer, num in cut if num < layer.units.num]
        for layer, num in cut:
            _compensate_(model, layer, num)
        for layer, num in cut:
            stay = torch.tensor(layer.order[len(layer.order) - num :]).sort().values
            _cut_(model, layer.units, stay, layer.numbers)
        support = pretrained_support()
        if support is not None:
            support.attach(model)
        return model


def narrow(
    model: nn.Module,
    *,
    batches: Batches,
    objective: Objective | Callable,
    keep: float | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> NarrowPlan:
    """Plans which attention heads, hidden units and channels to remove so that the loss grows least.

    What can be removed is found by setting outputs of layers to zero and comparing what changes, so it does not depend
    on the classes of modules: rows of one or several matrices (gate and up; Q, K and V) and columns of the one that
    they feed, with what a norm between them holds. The columns that stay are moved to make up for those that go, by
    least squares on the layer's inputs. The result has the same modules, with fewer rows and columns: it is faster on
    any hardware, and can be compressed further by `gm.compress`.

    Args:
        model: left untouched; the plan has a copy.
        batches: as in `gm.compress`.
        objective: as in `gm.compress`.
        keep: share of the parameters to keep; by default all, and `plan.at(keep=…)` chooses.
        include: name patterns of layers; only inputs of these are removed.
        exclude: name patterns of layers that stay as they are, rows and columns.
        progress: called with the number of layers done.

    Returns:
        A plan; `plan.at(keep=0.6).apply()`.

    Raises:
        InputError: no units can be removed, with the reasons; or as `gm.compress`.

    Cost: forward passes of two samples, some dozens for each layer; for a layer of n inputs half of `n³`
    multiplications in float64; 48 backward passes and nine evaluations of the batches kept apart.
    Source: optimal brain surgeon (Hassibi & Stork 1992), of whole columns, weighted by both second moments as in
    `gm.compress`.

    >>> net, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)), torch.randn(64, 8)
    >>> plan = narrow(net, batches=[(x, x[:, :2])], objective=Objective.regression(), keep=0.5)
    >>> plan.apply()[2].in_features, plan.parameters <= 0.5 * plan.parameters_dense
    (15, True)
    """
    model = as_model(model, "narrow")
    if isinstance(include, str) or isinstance(exclude, str):
        raise InputError("narrow: include and exclude are lists of patterns: exclude=['lm_head']")
    plain = unwrapped(model)
    own = copied(plain)
    known, reasons = _layers(own, exclude)
    calibration = calibrate(model, batches, objective)
    measure = calibration.measure
    if measure is None:
        raise InputError("narrow: runs in one process; call it on one rank, with batches of its own")
    notes, ranked, blind = judged(calibration)
    batch = _few(measure.batches[0])
    predict_ = as_objective(objective).predict

    def call(net: nn.Module) -> Tensor:
        made = [t for t in tensors(predict_(net, prepared(net, batch))) if t.is_floating_point()]
        if not made:
            raise InputError("narrow: the model's output holds no floating-point tensor")
        return torch.cat([t.detach().flatten().float() for t in made])

    wanted = {name: block for name, block in known.items() if not by_pattern(name, include, ())}
    reasons |= dict.fromkeys(known.keys() - wanted.keys(), "not included")
    consumers = [name for name, block in wanted.items() if not why_not(block)]
    found, without = find_units(own, consumers, known, call)
    reasons |= without
    layers: list[Narrowed] = []
    for units in found:
        numbers = _numbers_for(own, units, call)
        if isinstance(numbers, str):
            reasons[units.name] = numbers
            continue
        block = known[units.name]
        target = Target(units.name, block.module, block, block.name, block.name, block.parameter.numel())
        try:
            weights = weighting(target, calibration.stats, share=calibration.distinct, blind=blind)
        except Uncaptured as error:
            reasons[units.name] = str(error)
            continue
        w = matrix_of(block.module)
        gone = eliminated(w, weights, units.num)
        layers.append(Narrowed(units, gone.order, _spectrum(target, w, gone, weights), numbers, _price(own, units)))
        if progress is not None:
            progress(len(layers))
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:20])
        raise InputError(f"narrow: nothing of {type(plain).__name__} can be removed ({why or 'it has no matrices'})")
    if ranked and calibration.objective is not None:
        spectra = corrected(own, [layer.spectrum for layer in layers], measure.batches, calibration.objective)
        layers = [replace(layer, spectrum=s) for layer, s in zip(layers, spectra, strict=True)]
    for note in notes:
        warnings.warn(f"narrow: {note}", GramianWarning, stacklevel=2)
    whole = {layer.units.name: layer.units.num for layer in layers}
    plan = NarrowPlan(own, tuple(layers), 1.0, whole, reasons, tuple(notes))
    plan = replace(plan, points=_measured(plan, measure))
    return plan if keep is None else plan.at(keep=keep)


def _layers(model: nn.Module, exclude: Sequence[str]) -> tuple[dict[str, Block], dict[str, str]]:
    """Layers whose rows can be cut, by name, and why others cannot."""
    known: dict[str, Block] = {}
    reasons: dict[str, str] = {}
    adapters = adapted(model)
    for block in blocks(model).blocks:
        name, module = module_name(block), block.module
        if operation_of(module).factors not in ("linear", "convolution"):
            continue
        depthwise = is_elementwise(module)
        reason = (
            by_pattern(name, None, exclude) or adapters.get(id(module), "") or ("" if depthwise else why_not(block))
        )
        if reason:
            reasons[name] = reason
        elif not depthwise:
            known[name] = block
    return known, reasons


def _few(batch: Any) -> Any:
    return first_samples(batch, min(SAMPLES, num_samples(batch)))


def _spectrum(target: Target, w: Tensor, gone: Elimination, weights: Weighting) -> WeightedSVD:
    """The steps as what a decomposition has: the last to go is the last to lose."""
    m, n = w.shape
    return WeightedSVD(
        target.name,
        (gone.values * weights.matters).flip(0),
        gone.left.flip(1),
        gone.right.flip(0),
        weights.mean,
        n * (m + n) + 1,  # any number of columns may stay
        feedback_of(weights.columns, weights.rows),
        (),
        gone.values.new_ones(n),
    )


def _price(model: nn.Module, units: Units) -> int:
    total = submodule(model, units.name).get_parameter("weight").numel()
    for name in dict.fromkeys(part.name for part in units.parts):
        total += sum(p.numel() for p in submodule(model, name).parameters(recurse=False))
    return max(1, total // units.num)


def _numbers_for(
    model: nn.Module, units: Units, call: Callable[[nn.Module], Tensor]
) -> dict[str, dict[str, int]] | str:
    """Which numbers around the layers go down with the units, as the number of heads; or why they cannot be removed.

    The model without the units has to compute what the model with their outputs at zero does.
    """
    channels = _channels(submodule(model, units.name))
    outputs = {sum(len(p.outputs) for p in units.parts if p.name == part.name) for part in units.parts}
    for sizes in (set(), {units.num}, {channels}, {units.num, channels, *outputs}):
        numbers = _numbers(model, units, sizes)
        if sizes and not numbers:
            continue
        if all(_is_right(model, units, numbers, num, call) for num in {units.num // 2, units.num - 1}):
            return numbers
    return "without units of its input the model computes something else, whatever numbers are set"


def _numbers(model: nn.Module, units: Units, sizes: set[int]) -> dict[str, dict[str, int]]:
    """Integers of these sizes among the attributes of modules without parameters around the layers."""
    names = [units.name, *(part.name for part in units.parts)]
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    around = ".".join(common)
    found = {}
    for raw, module in model.named_modules():
        name = clean_module_name(raw)
        inside = name == around or not around or name.startswith(f"{around}.")
        if not inside or not name or list(module.parameters(recurse=False)):
            continue
        own = {k: v for k, v in vars(module).items() if type(v) is int and v in sizes and not k.startswith("_")}
        if own:
            found[name] = own
    return found


def _is_right(
    model: nn.Module, units: Units, numbers: dict[str, dict[str, int]], num: int, call: Callable[[nn.Module], Tensor]
) -> bool:
    stay = torch.arange(units.num)[units.num - num :]
    gone = torch.arange(units.num)[: units.num - num]
    size = _channels(submodule(model, units.name)) // units.num
    columns = (gone[:, None] * size + torch.arange(size)).flatten()
    consumer, dim = submodule(model, units.name), channel_dim(submodule(model, units.name), inputs=True)
    zeroed = lambda module, args: (args[0].index_fill(dim, columns.to(args[0].device), 0.0), *args[1:])  # noqa: E731
    made = copied(model)
    handle = consumer.register_forward_pre_hook(zeroed)
    try:
        with evaluating(model), torch.no_grad():
            wanted = call(model)
    finally:
        handle.remove()
    _cut_(made, units, stay, numbers)
    try:
        with evaluating(made), torch.no_grad():
            found = call(made)
    except (RuntimeError, ValueError, IndexError):  # what a model says of a shape that does not fit may be anything
        return False
    return is_near(found, wanted)


def _channels(layer: nn.Module) -> int:
    return layer.get_parameter("weight").shape[_dims(layer)[1]]


def _dims(layer: nn.Module) -> tuple[int, int]:
    """The dimensions of a weight along which its outputs and its input channels run."""
    layout = layout_of(layer)
    assert layout is not None
    rows, columns = layout.sides[-2:]
    of = [set(names) for names in layout.dims]
    return next(i for i, names in enumerate(of) if names & set(rows)), next(
        i for i, names in enumerate(of) if names & set(columns)
    )


@torch.no_grad()
def _cut_(model: nn.Module, units: Units, stay: Tensor, numbers: dict[str, dict[str, int]]) -> None:
    """Removes the columns and rows of units in place, and nothing more."""
    consumer = submodule(model, units.name)
    dim = _dims(consumer)[1]
    of_columns = torch.arange(_channels(consumer)).view(units.num, -1)[stay].flatten()
    _slice_(consumer, {"weight": dim}, "columns", of_columns)
    for name in dict.fromkeys(part.name for part in units.parts):
        module = submodule(model, name)
        outputs = [torch.tensor(p.outputs).view(units.num, -1)[stay].flatten() for p in units.parts if p.name == name]
        along = dict.fromkeys((k for k, t in _own(module) if t.ndim), 0)
        if not is_elementwise(module):
            along["weight"] = _dims(module)[0]
        _slice_(module, along, "rows", torch.cat(outputs).sort().values)
    for name, own in numbers.items():
        sliced_(submodule(model, name), {}, {key: value * len(stay) // units.num for key, value in own.items()})


def _slice_(layer: nn.Module, along: dict[str, int], side: str, at: Tensor) -> None:
    names = FEATURES[side]
    if side == "rows" and is_elementwise(layer) and layer_of(layer).operation == "convolution":
        names = (*names, *FEATURES["columns"], "groups")
    numbers = {name: len(at) for name in names if type(vars(layer).get(name)) is int}
    sliced_(layer, {name: (dim, at) for name, dim in along.items()}, numbers)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


@torch.no_grad()
def _compensate_(model: nn.Module, layer: Narrowed, num: int) -> None:
    """Moves the columns that stay to make up for those that go, which become zero; the bias takes up the mean."""
    s = layer.spectrum
    kept = num * (len(s.values) // layer.units.num)
    consumer = submodule(model, layer.units.name)
    lost = s.left[:, kept:] @ s.right[kept:]
    bias: Any = consumer._parameters.get("bias")
    if bias is not None and s.mean is not None:
        bias.add_((lost @ s.mean).to(bias.dtype))
    layout = layout_of(consumer)
    assert layout is not None
    w = matrix_of(consumer)
    consumer.get_parameter("weight").copy_(layout.join((w.double() - lost).to(w.dtype)))


def _measured(plan: NarrowPlan, measure: Measure) -> tuple[Point, ...]:
    """The rise of the loss at a few shares of what can be removed."""
    before, points = losses_of(plan.model, measure), []
    for removed in REMOVED:
        part = plan.at(keep=1 - removed * (1 - plan.smallest))
        points.append(measured_point(part.predicted_loss, before, losses_of(part.apply(), measure)))
    return tuple(points)
