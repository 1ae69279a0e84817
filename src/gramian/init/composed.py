"""Modules that apply several matrices inside one function of torch: attention, LSTM, GRU, RNN and their cells."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from gramian.init.kernels import isometry
from gramian.init.weights import BYPASSED, NOT_REACHED, PARAMETRIZED, ZERO, Weight, Weights, is_centered
from gramian.layers import layer_of

__all__ = ["leave_composed", "set_composed_"]

# ‖W‖² over the number of rows: the mean square of W x over that of white x. Of what a skip goes around, as `HEALTHY`
# in isometric.py. Two matrices at the upper end give scores of deviation 10, at which a softmax is saturated.
HEALTHY = (1e-4, 10.0)

FORGET = 1.0  # the bias of a forget gate


def leave_composed(weights: Weights, reached: Collection[nn.Module], around: Collection[nn.Module]) -> None:
    """Leaves the modules that no data reach, and those that a skip goes around with matrices of a usual size.

    Args:
        weights: those that may be set; what is left is noted there.
        reached: the modules that a forward pass calls.
        around: modules in residual branches.
    """
    low, high = HEALTHY
    for module, held in list(weights.composed.items()):
        sizes = [size for weight in held for size in _sizes(weight)]
        usual = all(low <= size <= high or size == 0 for size in sizes) and any(sizes)
        reason = NOT_REACHED if module not in reached else BYPASSED if module in around and usual else ""
        if reason:
            del weights.composed[module]
            for weight in held:
                weights.leave(reason, weight.block.name)


def _sizes(weight: Weight) -> list[float]:
    """Of each matrix that a weight holds, the mean square of its outputs over that of white inputs."""
    w = weight.block.layout.split(weight.value).float()
    return (w.square().sum((-2, -1)) / w.shape[-2]).flatten().tolist()


@torch.no_grad()
def set_composed_(weights: Weights, generator: torch.Generator) -> list[str]:
    """Sets each matrix of the composed modules that are left in `weights` to an isometry of gain one.

    Queries, keys, values and the output projection of an attention, and the input and recurrent matrix of each gate,
    get a Q of their own. Biases become zero, those of the forget gates of an LSTM one; vectors that are neither
    centered nor zero are by design, and stay.

    Args:
        weights: those that may be set; what a parametrization forbids is noted there.
        generator: draws Q.

    Returns:
        The names of what was set.
    """
    done: list[str] = []
    for module, held in weights.composed.items():
        zero = [weight for weight in held if not bool(weight.value.any())]
        zero = zero if len(zero) < len(held) else []
        for weight in zero:
            weights.leave(ZERO, weight.block.name)
        for weight in [weight for weight in held if weight not in zero]:
            like = weight.block.parameter.detach()
            if weight.set_(isometry(module, weight.block.layout, like, generator)):
                done.append(weight.block.name)
            else:
                weights.leave(PARAMETRIZED, weight.block.name)
        if any(weight.block.name in done for weight in held):
            _set_biases_(module)
    return done


def _set_biases_(module: nn.Module) -> None:
    for name, bias in _biases(module):
        num_gates = _gates(module)
        for gate, part in enumerate(bias.data.chunk(num_gates)):
            if not is_centered(part.double()):
                continue
            # Both biases of a cell are added: one of them is enough.
            is_forget = num_gates == 4 and gate == 1 and fnmatch.fnmatchcase(name, "bias_ih*")
            part.fill_(FORGET if is_forget else 0.0)


def _biases(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, p in module.named_parameters():
        local = name.rpartition(".")[2]
        if p.requires_grad and p.ndim == 1 and "bias" in local:
            yield local, p


def _gates(module: nn.Module) -> int:
    """How many gates stand in one bias of a recurrence; the parts of an attention's are centered each."""
    if layer_of(module).operation == "attention":
        return 1
    return {"LSTM": 4, "GRU": 3}.get(getattr(module, "mode", type(module).__name__.removesuffix("Cell")), 1)
