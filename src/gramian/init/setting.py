"""Sets weights to isometries of the size that the activation behind needs, and measures what was reached."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gramian import random
from gramian.init.gains import CriticalPoint, critical_point, point_of
from gramian.init.kernels import isometry
from gramian.init.measured_activations import STEP, interpolated, measured_activations
from gramian.init.paths import batch_statistics, hooked
from gramian.init.reached import CURE, MOST_CHANGE, changes
from gramian.init.weights import BYPASSED, PARAMETRIZED, Weights
from gramian.layers import operation_of
from gramian.objective import Objective
from gramian.operators import layer_gains
from gramian.recording import measuring
from gramian.recording.hooks import hooks

__all__ = ["Setting"]

# Root mean square of the first layer's output where a sample is given: past the linear part of tanh, not saturated.
INPUT_RMS = 0.5

# Measurements of the gains behind what does not work element by element: each changes the sizes that later layers see.
NUM_SWEEPS = 4

# A residual stream that grows by more than this is scaled, by no less than that.
MOST_GROWTH, LEAST_FACTOR = 10.0, 1e-3

# Layers behind an activation without a stable critical point, from which that is told where nothing is measured.
MANY = 5


@dataclass
class Setting:
    """What is set, and on what it is measured.

    Args:
        model: set in place.
        sample: a batch, or `None`.
        objective: predicts.
        weights: those that may be set; what cannot be is noted there.
        generator: draws matrices and biases.
        rows: layers whose second half of rows is the negative of the first: `[Q; −Q]`.
        columns: layers whose second half of columns is the negative of the first, and c of the activation before.
    """

    model: nn.Module
    sample: Any
    objective: Objective
    weights: Weights
    generator: torch.Generator
    rows: set[nn.Module] = field(default_factory=set)
    columns: dict[nn.Module, float] = field(default_factory=dict)

    def critical_points(
        self, chosen: Sequence[nn.Module], followed: Iterable[tuple[nn.Module, nn.Module | None]]
    ) -> dict[nn.Module, CriticalPoint]:
        """The critical point of what follows each layer; none where it is unknown."""
        points: dict[nn.Module, CriticalPoint] = {}
        known: dict[Any, CriticalPoint] = {}
        activations = dict(followed)
        for layer in chosen:
            activation = activations.get(layer)
            if activation is not None:
                key = (str(activation), tuple(p.detach().sum().item() for p in activation.parameters()))
                points[layer] = known[key] if key in known else known.setdefault(key, point_of(activation))
        rest = [m for m in chosen[:-1] if m not in points]
        if rest and self.sample is not None:
            for layer, (grid, values) in self._between(rest).items():
                key = (len(values), values.sum().item(), values.square().sum().item())
                if key not in known:
                    known[key] = critical_point(interpolated(grid, values), STEP)
                points[layer] = known[key]
        return points

    def _between(self, layers: Sequence[nn.Module]) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        owners = [m for m in self.model.modules() if m in self.weights.by_layer or m in self.weights.others]
        return measured_activations(self.model, layers, owners, self.sample, self.objective)

    def mirror(
        self, chosen: Sequence[nn.Module], order: Sequence[nn.Module], points: dict[nn.Module, CriticalPoint]
    ) -> None:
        """Chooses the layers that are set so that, with the next one, they compute a linear function.

        That needs an activation with φ(z) − φ(−z) = c z (ReLU, GELU, SiLU, softplus) that alone stands between two
        linear layers of an even width in common, each used once. What holds is then an isometry, at any depth.
        """
        layers = [m for m in order if m in self.weights.by_layer or m in self.weights.others]
        pairs = [
            (m, after)
            for m, after in pairwise(layers)
            if m in chosen
            and after in chosen
            and m in points
            and points[m].odd
            and all(self._is_plain_matrix(one) and layers.count(one) == 1 for one in (m, after))
            and self._shape(m)[0] == self._shape(after)[1]
            and self._shape(m)[0] % 2 == 0
        ]
        if self.sample is not None and pairs:
            alone = self._between([m for m, _ in pairs])
            pairs = [(m, after) for m, after in pairs if m in alone]
        for m, after in pairs:
            self.rows.add(m)
            self.columns[after] = points[m].odd

    def _is_plain_matrix(self, layer: nn.Module) -> bool:
        layout = self.weights.by_layer[layer].block.layout
        return operation_of(layer).init == "orthogonal" and len(layout.matrices) == 2 and not layout.rows

    def _shape(self, layer: nn.Module) -> tuple[int, ...]:
        return self.weights.by_layer[layer].block.layout.matrices

    def isometry_(self, layer: nn.Module, point: CriticalPoint | None) -> bool:
        """Sets σ Q and a bias of zero; `False`, and noted, where a parametrization forbids it."""
        weight = self.weights.by_layer[layer]
        block = weight.block
        scale = point.weight if point is not None and layer not in self.rows else 1.0
        like = block.parameter.detach()
        if layer in self.rows or layer in self.columns:
            rows, columns = self._shape(layer)
            shape = (rows // (1 + (layer in self.rows)), columns // (1 + (layer in self.columns)))
            q = random.orthogonal(*shape, generator=self.generator, device=self.generator.device).to(like)
            q = torch.cat([q, -q], 1) / self.columns[layer] if layer in self.columns else q
            value = scale * block.layout.join(torch.cat([q, -q]) if layer in self.rows else q)
        else:
            value = scale * isometry(weight.layer, block.layout, like, self.generator)
        if not weight.set_(value):
            self.weights.leave(PARAMETRIZED, block.name)
            return False
        bias = self._bias(layer)
        if bias is not None:
            bias.zero_()
        return True

    def _bias(self, layer: nn.Module) -> Tensor | None:
        bias = getattr(self.weights.by_layer[layer].layer, "bias", None)
        return bias.data if isinstance(bias, nn.Parameter) and bias.requires_grad else None

    def sizes_(
        self, chosen: Sequence[nn.Module], points: dict[nn.Module, CriticalPoint], entered: nn.Module | None
    ) -> None:
        """Scales the layer that the data enter, and holds preactivations at their critical mean square.

        With a sample, layer by layer in one forward pass: `W` is scaled so that `W x` has a mean square of q − σ_b²,
        and the bias is drawn. Without one, the data are taken to have a mean square of one.
        """
        wanted: dict[nn.Module, tuple[float, float]] = {}  # mean square of W x, and the bias's standard deviation
        for layer in chosen:
            point = points.get(layer)
            if point is not None and point.square is not None and layer not in self.rows:
                bias = point.bias if self._bias(layer) is not None else 0.0
                wanted[layer] = (point.square - point.bias**2, bias)
            elif layer is entered and self.sample is not None:
                wanted[layer] = (INPUT_RMS**2, 0.0)
        done: set[Any] = set()

        def scale(layer: nn.Module, size: float) -> Tensor | None:
            weight = self.weights.by_layer[layer]
            square, spread = wanted[layer]
            done.add(weight)
            if math.isfinite(size) and size > 0:
                weight.set_(weight.value * math.sqrt(square / size))
            bias = self._bias(layer)
            if bias is not None and spread:
                drawn = torch.empty(bias.shape, device=self.generator.device).normal_(generator=self.generator)
                bias.copy_(spread * drawn)
            return None

        def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self.weights.by_layer[layer] in done or not isinstance(output, Tensor):
                return None
            scale(layer, float(output.double().square().mean()))
            return layer.forward(*args)

        if self.sample is not None:
            handles = [layer.register_forward_hook(after) for layer in wanted]
            with hooks(handles), measuring(self.model), torch.no_grad():
                self.objective.predict(self.model, self.sample)
            return
        for layer in wanted:
            weight = self.weights.by_layer[layer]
            rows, columns = weight.block.layout.matrices[-2:]
            point = points[layer]
            kept = min(1.0, columns / rows)  # of the mean square, by an isometry into more dimensions
            before = 1.0 if layer is entered else wanted[layer][0] / point.weight**2
            scale(layer, point.weight**2 * kept * before)

    def branches_(self, around: Sequence[nn.Module], ends: Sequence[nn.Module]) -> list[str]:
        """Scales the last layers of residual branches where the stream is seen to grow with depth; says so.

        By 1/√K for K branches, which keeps a sum of K independent branches of the stream's own size at that size, and
        by further halves where that is not enough. Behind norms nothing is seen to grow.

        Source: Hanin & Rolnick (1803.01719), theorem 6, and Zhang, Dauphin & Ma (1901.09321).
        """
        first = growth = self._growth(around) if ends and self.sample is not None else 1.0
        factor = 1.0
        while growth > MOST_GROWTH and factor > LEAST_FACTOR:
            step = 0.5 if factor < 1 else len(ends) ** -0.5 if len(ends) > 1 else 0.5
            factor *= step
            for weight in dict.fromkeys(self.weights.by_layer[m] for m in ends):
                weight.set_(weight.value * step)
                bias = self._bias(weight.layer)
                if bias is not None:
                    bias.mul_(step)
            growth = self._growth(around)
        if factor == 1:
            return []
        scaled = {self.weights.by_layer[m].block.name for m in ends}
        self.weights.left[BYPASSED] = [name for name in self.weights.left[BYPASSED] if name not in scaled]
        told = f"scaled the last layers of {len(ends)} residual branches by {factor:.2g}, since the stream grew"
        return [f"{told} by a factor of {first:.1e} (now {growth:.2g})"]

    def _growth(self, layers: Sequence[nn.Module]) -> float:
        """The largest root mean square of the inputs of some layers, over that of the first."""
        sizes: list[float] = []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and x.is_floating_point():
                sizes.append(float(x.double().square().mean().sqrt()))

        with hooked(dict.fromkeys(layers), note), measuring(self.model), batch_statistics(self.model), torch.no_grad():
            self.objective.predict(self.model, self.sample)
        largest = max((size if math.isfinite(size) else math.inf for size in sizes), default=0.0)
        return largest / sizes[0] if sizes and sizes[0] > 0 else 1.0

    def sweep_(self, layers: Sequence[nn.Module]) -> None:
        """Divides layers before what does not work element by element (pooling) by the gains that are measured."""
        for _ in range(NUM_SWEEPS if layers and self.sample is not None else 0):
            gains = layer_gains(self.model, self.sample, self.objective)
            for weight in [self.weights.by_layer[m] for m in layers]:
                gain = gains.get(weight.block.name)
                if gain is not None and gain.chi > 0:
                    weight.set_(weight.value / math.sqrt(gain.chi))

    def beyond(self, hidden: Sequence[nn.Module], points: dict[nn.Module, CriticalPoint]) -> list[str]:
        """What was not reached: a depth across which gradients still shrink or grow."""
        unstable = [m for m in hidden if m in points and m not in self.rows and not points[m].stable]
        critical = [m for m in hidden if m in points and m not in self.rows and points[m].bias]
        biased = [m for m in critical if self._bias(m) is None]
        why = [
            *([f"{len(unstable)} stand before an activation without a stable critical point"] if unstable else []),
            *([f"{len(biased)} have no bias, which their activation needs"] if biased else []),
        ]
        if self.sample is None:
            if len(unstable) + len(biased) < MANY:
                return []
            return [f"beyond initialization at depth: of {len(hidden)} layers, {' and '.join(why)}; {CURE}"]
        backward, forward = changes(self.model, hidden, self.sample, self.objective)
        told = [
            f"{what} still change by a factor of {change:.1e}"
            for what, change in (("gradients", backward), ("signals", forward))
            if not 1 / MOST_CHANGE <= change <= MOST_CHANGE
        ]
        if not told:
            return []
        return ["; ".join([f"beyond initialization: across {len(hidden)} layers {' and '.join(told)}", *why, CURE])]
