"""Muon: momentum, orthogonalized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gramian import linalg
from gramian.optim.batches import State
from gramian.optim.shell import MatrixOptimizer, Recipe, Shared, Turn

__all__ = ["Muon", "average", "look_ahead", "orthogonal"]


def init(m: Tensor, options: Mapping[str, Any]) -> State:
    """The momentum, and where it is kept for several steps, the direction."""
    state = {"momentum": torch.zeros_like(m, memory_format=torch.contiguous_format)}
    return state | ({"direction": torch.zeros_like(state["momentum"])} if options["refresh"] > 1 else {})


def update(g: Tensor, state: State, turn: Turn) -> Tensor:
    """polar(B + (1 − μ)(g − B)), with B ← B + (1 − μ)(g − B)."""
    average(state["momentum"], g, turn.options["momentum"], turn)
    ahead = look_ahead(g, state["momentum"], turn)
    if "direction" not in state:
        return orthogonal(ahead, turn)
    if turn.due is None:
        state["direction"].copy_(orthogonal(ahead, turn))
    elif len(turn.due):
        state["direction"][turn.due] = orthogonal(ahead[turn.due], turn)
    return state["direction"]


def average(mean: Tensor, value: Tensor, beta: float, turn: Turn) -> None:
    """mean ← mean + (1 − β)(value − mean), in place, but for matrices whose gradient was not finite."""
    if turn.all_alive:  # twice as fast as with a weight for each matrix
        mean.lerp_(value, 1 - beta)
    else:
        mean.lerp_(value, ((1 - beta) * turn.alive).expand_as(mean))


def look_ahead(g: Tensor, momentum: Tensor, turn: Turn) -> Tensor:
    """Nesterov's: the momentum as one more step with the same gradient would make it."""
    if not turn.options["nesterov"]:
        return momentum
    return torch.lerp(g, momentum, turn.options["momentum"])


def orthogonal(x: Tensor, turn: Turn) -> Tensor:
    """The polar factor, to `rtol`."""
    return linalg.polar_ex(x, rtol=turn.options["rtol"], certify=False)[0]


class Muon(MatrixOptimizer):
    """Steps along the polar factor of the momentum: `W ← W − lr · s · polar(μB + (1 − μ)g)`, with `B ← μB + (1 − μ)g`.

    The direction `U Vᵀ = (B Bᵀ)^(-1/2) B` has all singular values equal to one, so that weak directions of the
    gradient move as far as strong ones. Embeddings, the head, norms, biases and vectors take fused AdamW inside the
    same optimizer: one `state_dict`, one set of `param_groups`, ordinary schedulers.

    Args:
        params: the model, or its parameters.
        lr: length of a step of the matrices, in the unit that `scale` sets.
        momentum, nesterov: μ, and whether the step looks ahead by one momentum update.
        rtol: root mean square of σ − 1 over the singular values of the direction; the cheapest way there is taken
            (see `gm.linalg.polar_ex`). Five Newton–Schulz steps in bfloat16, as elsewhere, have about 0.18.
        shared: see `MatrixOptimizer`.

    Cost: per step and matrix of m ≤ n, about `3 m²n + 5 m³` operations at `rtol=0.1`; those of one shape go together.
    Source: Jordan et al., Muon (2024); scale: Large et al. (2405.14813), §3, and Liu et al. (2502.16982), §2.2.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> optimizer = Muon(net, lr=0.05)
    >>> [(row["name"], row["direction"]) for row in optimizer.explain()][:2]
    [('0.weight', 'matrix'), ('2.weight', 'adamw')]
    """

    recipe = Recipe(init, update)

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 0.05,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        rtol: float = 0.1,
        **shared: Unpack[Shared],
    ) -> None:
        options = {"momentum": momentum, "nesterov": nesterov, "rtol": rtol}
        super().__init__(params, lr, options, **shared)
