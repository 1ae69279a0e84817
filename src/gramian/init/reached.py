"""How signals and gradients change across layers, and the way back where an initialization made that worse."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gramian.init.paths import batch_statistics
from gramian.objective import Objective
from gramian.recording import measuring
from gramian.recording.hooks import hooks

__all__ = ["CURE", "MOST_CHANGE", "State", "changes"]

# Gradients or signals that change by more than this factor across the layers that were set are told.
MOST_CHANGE = 100.0

# The old weights are put back where the new ones change gradients or signals by so much more, and by at least so much.
MOST_WORSE, LEAST_WORSE = 2.0, 10.0

CURE = "a norm or a skip in each block is what helps"


class State(NamedTuple):
    """A model's parameters and buffers, and how gradients and signals change across some layers with them."""

    kept: Mapping[str, Any]
    layers: Sequence[nn.Module]
    backward: float
    forward: float

    @staticmethod
    def of(model: nn.Module, layers: Sequence[nn.Module], sample: Any, objective: Objective) -> State:
        """The state that a model is in; without a sample, no change is known, and none is worse."""
        kept = copy.deepcopy(model.state_dict()) if sample is not None else {}
        return State(kept, layers, *changes(model, layers, sample, objective))

    def restore_if_better_(self, model: nn.Module, sample: Any, objective: Objective) -> list[str]:
        """Puts this state back where signals or gradients now change clearly more than in it; says so."""
        now = State({}, self.layers, *changes(model, self.layers, sample, objective))
        if now.size < max(MOST_WORSE * self.size, LEAST_WORSE):
            return []
        model.load_state_dict(self.kept)
        told = (
            f"left all as it was, since isometries are worse: across {len(self.layers)} layers gradients change by a "
            f"factor of {self.backward:.2g} and signals by {self.forward:.2g}, with isometries gradients by "
            f"{now.backward:.2g} and signals by {now.forward:.2g}"
        )
        return [f"{told}. This is beyond initialization; {CURE}" if self.size > MOST_CHANGE else told]

    @property
    def size(self) -> float:
        """The larger of both changes, where a shrinking by a factor counts as a growth by it."""
        return max(max(c, 1 / c) if 0 < c < math.inf else math.inf for c in (self.backward, self.forward))


def changes(model: nn.Module, layers: Sequence[nn.Module], sample: Any, objective: Objective) -> tuple[float, float]:
    """How a random vector's gradient changes from the last layer's output to the first's; and the output's size.

    Args:
        model: left as it was.
        layers: in the order of the forward pass; of fewer than three, no change is told.
        sample: a batch, or `None`.
        objective: predicts.
    """
    if sample is None or len(layers) < 3:
        return 1.0, 1.0
    outputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        outputs.setdefault(module, output)
        return output.clone()  # what follows may work in place

    handles = [layer.register_forward_hook(note) for layer in (layers[0], layers[-1])]
    with hooks(handles), measuring(model), batch_statistics(model), torch.enable_grad():
        objective.predict(model, sample)
    if len(outputs) < 2:
        return 1.0, 1.0
    first, last = outputs[layers[0]], outputs[layers[-1]]
    v = torch.empty_like(last).normal_(generator=torch.Generator(last.device).manual_seed(0))
    (gradient,) = torch.autograd.grad(last, first, v, allow_unused=True)
    sizes = [float(x.detach().double().square().mean().sqrt()) for x in (first, last)]
    backward = 1.0 if gradient is None else float(gradient.double().norm() / v.double().norm())
    return backward, sizes[1] / sizes[0] if sizes[0] > 0 else 1.0
