"""Faults of optimizers: rates, momentum, decay, and parameters that get no step."""

from __future__ import annotations

import torch

from gramian.bench.faults.architectures import Options
from gramian.bench.faults.kinds.table import Planted, kind
from gramian.bench.faults.setup import Draw, Setup

OPTIMIZER = ("optimizer",)


def _rate(setup: Setup, factor: float) -> Planted:
    for group in setup.optimizer.param_groups:
        group["lr"] *= factor
    return Planted(OPTIMIZER, f"× {factor:.3g}")


@kind("rate-too-high", "rate-too-high")
def rate_too_high(setup: Setup, draw: Draw) -> Planted:
    """The learning rate is far too high."""
    return _rate(setup, draw.power(1.7, 2.7))


@kind("rate-too-low", "rate-too-low")
def rate_too_low(setup: Setup, draw: Draw) -> Planted:
    """The learning rate is far too low."""
    return _rate(setup, draw.power(-4, -2.5))


@kind("momentum-too-high", "momentum-too-high", consequences="rate-too-high", options=Options(optimizer="sgd"))
def momentum_too_high(setup: Setup, draw: Draw) -> Planted:
    """Momentum remembers a thousand steps and more."""
    momentum = draw.choice((0.999, 0.9995))
    for group in setup.optimizer.param_groups:
        group["momentum"] = momentum
    return Planted(OPTIMIZER, f"{momentum}")


@kind("group-without-steps", "parameter-not-stepped", consequences="rate-too-low")
def group_without_steps(setup: Setup, draw: Draw) -> Planted:
    """The optimizer does not have most parameters, or their group's rate is zero."""
    head = [p for n, p in setup.model.named_parameters() if n.startswith("head")]
    rest = {n: p for n, p in setup.model.named_parameters() if not n.startswith("head")}
    group, how = setup.optimizer.param_groups[0], draw.choice(("left out", "rate 0"))
    options = {k: v for k, v in group.items() if k in ("lr", "momentum", "weight_decay")}
    groups: list[dict] = [{"params": head}]
    if how == "rate 0":
        groups.append({"params": list(rest.values()), "lr": 0.0})
    made = torch.optim.AdamW if isinstance(setup.optimizer, torch.optim.AdamW) else torch.optim.SGD
    setup.optimizer = made(groups, **options)
    return Planted((*OPTIMIZER, *rest, "stem", "blocks"), how)


@kind("weight-decay-too-large", "weight-decay-too-large", consequences="rate-too-high")
def weight_decay_too_large(setup: Setup, draw: Draw) -> Planted:
    """Weight decay shrinks the weights faster than they learn."""
    per_step = draw.uniform(0.2, 0.6)
    for group in setup.optimizer.param_groups:
        group["weight_decay"] = per_step / group["lr"]
    return Planted(OPTIMIZER, f"{per_step:.2g} a step")
