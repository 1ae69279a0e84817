"""Muon: momentum, orthogonalized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gramian import linalg
from gramian.optim.health import sine
from gramian.optim.options import FLAG, Shared, interval
from gramian.optim.polar import approaches, pads, polar
from gramian.optim.recipe import Recipe, StepContext
from gramian.optim.shell import MatrixOptimizer
from gramian.optim.stacks import State

__all__ = [
    "Muon",
    "advanced",
    "average",
    "choose",
    "init",
    "look_ahead",
    "mixed",
    "orthogonal",
    "staleness",
    "update",
    "weight_of_past",
]

PART = 1 << 17
"""Entries of the gradients that are averaged together on a CPU: both they and the means fit its second cache."""

YOUNG = 10.0
"""Steps after which the past has a weight of one half, if `momentum` allows it."""


def init(m: Tensor, options: Mapping[str, Any]) -> State:
    """The momentum, and with `refresh` above one, the direction."""
    state = {"momentum": torch.zeros_like(m, memory_format=torch.contiguous_format)}
    return state | ({"direction": torch.zeros_like(state["momentum"])} if options["refresh"] > 1 else {})


def update(g: Tensor, state: State, context: StepContext) -> Tensor:
    """polar(B + (1 − μ)(g − B)), with B ← B + (1 − μ)(g − B)."""
    ahead = advanced(g, state["momentum"], context)
    if "direction" not in state:
        return polar(ahead, context.options, out=g, shape=context.shape)
    if context.due is None:
        state["direction"].copy_(orthogonal(ahead, context))
    elif len(context.due):
        state["direction"][context.due] = orthogonal(ahead[context.due], context)
    return state["direction"]


def staleness(state: State, options: Mapping[str, Any]) -> Tensor | None:
    """The sine of the angle between the direction that is kept and the polar factor of the present momentum."""
    if "direction" not in state:
        return None
    return sine(state["direction"].double(), linalg.polar_ex(state["momentum"].double())[0])


def average(mean: Tensor, value: Tensor, beta: float, context: StepContext) -> None:
    """mean ← mean + (1 − β)(value − mean), in place, except for matrices without a finite gradient."""
    if context.all_alive:  # twice as fast as with a weight for each matrix
        mean.lerp_(value, 1 - beta)
    else:
        mean.lerp_(value, ((1 - beta) * context.alive.to(mean.dtype)).expand_as(mean))


def advanced(g: Tensor, momentum: Tensor, context: StepContext) -> Tensor:
    """What is orthogonalized: the momentum or, over `g`, that of one more step."""
    beta = weight_of_past(context.options)
    return mixed(g, momentum, beta, beta if context.options["nesterov"] else 1.0, context)


def mixed(g: Tensor, momentum: Tensor, beta: float, past: float, context: StepContext) -> Tensor:
    """The momentum after this gradient, and what is between both: over `g`, in parts, which stay in the cache.

    Args:
        g: the gradients.
        momentum: B ← B + (1 − β)(g − B).
        beta: β.
        past: the weight of B beside g, at most β; or 1, for the momentum itself.
        context: of the step.
    """
    past = past if past == 1 else min(past, beta)
    if not context.all_alive or g.device.type != "cpu" or g.numel() <= PART:
        average(momentum, g, beta, context)
        return momentum if past == 1 else g.lerp_(momentum, past)
    for part, mean in zip(g.view(-1).split(PART), momentum.view(-1).split(PART), strict=True):
        average(mean, part, beta, context)
        if past < 1:
            part.lerp_(mean, past)
    return momentum if past == 1 else g


def weight_of_past(options: Mapping[str, Any]) -> float:
    """The weight of the past in step t: t / (t + 10), and at most `momentum`. The network changes fast at first.

    >>> [round(weight_of_past({"momentum": 0.9, "step": t - 1}), 2) for t in (1, 10, 30, 90, 1000)]
    [0.09, 0.5, 0.75, 0.9, 0.9]
    """
    step = options["step"] + 1
    return min(options["momentum"], step / (step + YOUNG))


def look_ahead(g: Tensor, momentum: Tensor, beta: float, context: StepContext) -> Tensor:
    """Nesterov's momentum: what one more step with the same gradient would make of it.

    Written over `g`, since a new tensor of that size costs more than its numbers; or `momentum` itself.
    """
    return g.lerp_(momentum, beta) if context.options["nesterov"] else momentum


def orthogonal(x: Tensor, context: StepContext) -> Tensor:
    """The polar factor, to the accuracy `rtol`."""
    return polar(x, context.options, shape=context.shape)


def choose(shapes: Iterable[tuple[int, int]], device: torch.device, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the polar factors of these shapes are computed."""
    return {"approaches": approaches(shapes, device, options)}


class Muon(MatrixOptimizer):
    """Steps along the polar factor of the momentum: `W ← W − lr · s · polar(μB + (1 − μ)g)`, with `B ← μB + (1 − μ)g`.

    The direction `U Vᵀ = (B Bᵀ)^(-1/2) B` has all singular values equal to one, so that weak directions of the
    gradient move as far as strong ones. Embeddings, the head, norms, biases and vectors are stepped by fused AdamW
    inside the same optimizer: one `state_dict`, one list of `param_groups`, ordinary schedulers.

    Args:
        params: the model (best), or its parameters; see `gramian.optim.shell.MatrixOptimizer`.
        lr: length of a step of the matrices, in the unit that `scale` sets; by default 0.1, and with
            `scale="spectral"` 0.1 · √(L/2) where L is more than two, at most 1, and at most 0.2 for a plain network;
            that fades as 1/√t after (L / 2 lr)² steps, where a group's `"fades"` is true.
        momentum: μ, the weight of the past in the running mean of the gradients; t / (t + 10) in step t while that is
            less.
        nesterov: whether the step looks ahead by one update of the momentum.
        rtol: root mean square of σ − 1 over those singular values of the direction that are not too small before
            (σ/σ₁ above 1/700 by default). The usual five Newton–Schulz steps in bfloat16 reach about 0.2.
        shared: options of all matrix optimizers, see `gramian.optim.shell.MatrixOptimizer`.

    Raises:
        InputError: as `gramian.optim.shell.MatrixOptimizer`.
    Cost: per step and matrix of m ≤ n, about `3 m²n + 5 m³` operations at `rtol=0.1`, batched by shape.
    Source: Jordan et al., Muon (2024); scale: Large et al. (2405.14813), §3, and Liu et al. (2502.16982), §2.2.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> optimizer = Muon(net, lr=0.05)
    >>> [(row["name"], row["direction"]) for row in optimizer.explain()][:2]
    [('0.weight', 'matrix'), ('2.weight', 'adamw')]
    """

    grows_with_depth = True

    recipe = Recipe(
        init=init,
        update=update,
        options={
            "momentum": interval("[0, 1)"),
            "nesterov": FLAG,
            "rtol": interval("(0, 1)"),
        },
        adamw={"momentum": "exp_avg"},
        momentum="momentum",
        staleness=staleness,
        choose=choose,
        pads=pads,
    )

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | None = None,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        rtol: float = 0.125,
        **shared: Unpack[Shared],
    ) -> None:
        options = {"momentum": momentum, "nesterov": nesterov, "rtol": rtol}
        super().__init__(params, lr, options, **shared)
