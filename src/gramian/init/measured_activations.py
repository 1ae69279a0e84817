"""What a model computes between two layers, measured: an activation that is no module of torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.objective import Objective
from gramian.recording import measuring
from gramian.recording.hooks import hooks

__all__ = ["STEP", "interpolated", "measured_activations"]

# An activation that is no module is measured on a grid in place of a layer's output: this wide, of at least so many
# points, which are dense at the origin, with differences of this step.
WIDEST, LEAST_POINTS, STEP = 80.0, 256, 0.02


def measured_activations(
    model: nn.Module, layers: Sequence[nn.Module], owners: Sequence[nn.Module], sample: Any, objective: Objective
) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """What lies between a layer and the next one, where it works element by element: (x, φ(x)) on a grid.

    The layer's output is replaced by a grid in two random orders; φ is the same in both only if it looks at no
    other element.

    Args:
        model: left as it was.
        layers: whose outputs are replaced.
        owners: all modules that hold matrices; the next of them is where φ is read.
        sample: a batch.
        objective: predicts.
    """
    found: list[dict[nn.Module, tuple[Tensor, Tensor]]] = []
    for seed in (0, 1):
        measured: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        pending: list[tuple[nn.Module, Tensor, torch.Size]] = []
        draws = torch.Generator().manual_seed(seed)  # of one order for each layer: a product of two layers is no φ

        def after(module: nn.Module, args: tuple[Any, ...], output: Any, draws=draws, pending=pending) -> Any:
            pending.clear()
            narrow = not isinstance(output, Tensor) or output.dtype not in (torch.float32, torch.float64)
            if module not in layers or narrow or output.numel() < LEAST_POINTS:
                return None
            line = torch.linspace(-1, 1, output.numel(), dtype=torch.float64)
            grid = WIDEST * torch.sinh(5 * line) / math.sinh(5)
            order = torch.randperm(len(grid), generator=draws)
            pending.append((module, order, output.shape))
            return grid[order].view(output.shape).to(output)

        def before(module: nn.Module, args: tuple[Any, ...], measured=measured, pending=pending) -> None:
            x = args[0] if args else None
            if pending and isinstance(x, Tensor) and x.shape == pending[0][2]:
                layer, order, _ = pending[0]
                values = torch.empty(x.numel(), dtype=torch.float64)
                values[order] = x.detach().double().flatten().cpu()
                line = torch.linspace(-1, 1, x.numel(), dtype=torch.float64)
                measured.setdefault(layer, (WIDEST * torch.sinh(5 * line) / math.sinh(5), values))
            pending.clear()

        handles = [h for m in owners for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
        with hooks(handles), measuring(model), torch.no_grad():
            objective.predict(model, sample)
        found.append(measured)
    first, second = found
    return {
        layer: pair
        for layer, pair in first.items()
        if layer in second and bool(pair[1].isfinite().all()) and torch.allclose(pair[1], second[layer][1], 1e-4, 1e-5)
    }


def interpolated(grid: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    """The piecewise linear function through points, continued beyond them."""

    def phi(z: Tensor) -> Tensor:
        k = torch.searchsorted(grid, z.detach().contiguous()).clamp(1, len(grid) - 1)
        slope = (values[k] - values[k - 1]) / (grid[k] - grid[k - 1])
        return values[k - 1] + slope * (z - grid[k - 1])

    return phi
