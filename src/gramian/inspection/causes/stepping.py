"""Causes in the optimizer: its settings, what it moves, and what its steps do on a copy of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.report import Finding

__all__ = ["RULES"]

# Relative change of a matrix in a step, ‖ΔW‖_F / ‖W‖_F: AdamW at 1e-3 makes 0.02 at first, a late step 1e-4.
SLOW, FAST = 1e-4, 0.5
# A loss diverges that rises to this many times its first value, and by this much. It makes no progress while it is
# above this share of its first value, unless that was already small.
DIVERGES, RISES, NO_PROGRESS, SOLVED = 3.0, 3.0, 0.9, 0.05
MOMENTUM = 0.995
# Share of each weight that decay removes in a step; AdamW's default 1e-5.
DECAY = 2e-3
# Usual decays are up to 0.1, and up to 5e-3 where the decay joins the gradient.
LARGE_DECOUPLED, LARGE_COUPLED = 0.2, 0.02
# For Adam and AdamW this is too large at any rate.
LARGE_ADAM = 0.3


def covered(context: Context) -> Iterator[Finding]:
    """Find parameters that the optimizer does not have, or has at a rate of zero. Exact."""
    if context.optimizer is None:
        return
    rates: dict[int, float] = {}
    for group in context.optimizer.param_groups:
        for p in group["params"]:
            rates[id(p)] = float(group.get("lr", 1.0))
    trained = {n: p for n, p in context.parameters.items() if p.requires_grad}
    absent = [n for n, p in trained.items() if id(p) not in rates]
    still = [n for n, p in trained.items() if rates.get(id(p)) == 0.0]
    if absent or still:
        names = absent or still
        modules = list(dict.fromkeys(context.module_of(n) or n for n in names))
        everything = len(names) == len(trained)
        yield Finding(
            "parameter-not-stepped",
            "error",
            f"The optimizer does not move {len(names)} of {len(trained)} parameters",
            where="optimizer" if everything else some(modules, SHOWN),
            evidence=f"{some(names, SHOWN)}: in "
            + ("none of its groups (exact)" if absent else "a group with a rate of zero (exact)"),
            cause="The optimizer was made before these layers were added or replaced, for a copy of the model, or for "
            "a part of it.",
            advice="Make the optimizer with model.parameters() after the model is complete.",
        )


def settings(context: Context) -> Iterator[Finding]:
    """Judge momentum and weight decay."""
    if context.optimizer is None:
        return
    for group in context.optimizer.param_groups:
        momentum = _momentum(group)
        if momentum >= MOMENTUM:
            yield Finding(
                "momentum-too-high",
                "warning",
                f"A momentum of {momentum:g} averages over {1 / max(1 - momentum, 1e-9):,.0f} steps",
                where="optimizer",
                evidence=f"momentum or β₁ is {momentum:g}; usual are 0.8 to 0.99",
                cause="Steps go on in old directions, and SGD's are 1/(1 − momentum) times as large.",
                advice="Use 0.9, or divide the rate by the same factor.",
            )
            break
    for group in context.optimizer.param_groups:
        rate, decay = float(group.get("lr", 0.0)), float(group.get("weight_decay", 0.0) or 0.0)
        unusual = decay > (LARGE_DECOUPLED if _is_decoupled(context.optimizer, group) else LARGE_COUPLED)
        if unusual and (rate * decay > DECAY or ("betas" in group and decay >= LARGE_ADAM)):
            yield Finding(
                "weight-decay-too-large",
                "error" if rate * decay > 5 * DECAY else "warning",
                f"Weight decay of {decay:g} takes {rate * decay:.2g} of each weight in a step",
                where="optimizer",
                evidence=f"rate {rate:g} × decay {decay:g} = {rate * decay:.2g}: weights halve in "
                f"{math.log(2) / max(rate * decay, 1e-12):,.0f} steps",
                cause="The decay outweighs the gradient, and the weights shrink to zero.",
                advice="Use 0 to 0.1 for AdamW, 1e-4 to 1e-3 for SGD.",
            )
            break


def steps(context: Context) -> Iterator[Finding]:
    """Judge the rate by what a few steps on a copy did to the loss and to the matrices."""
    taken = context.steps
    if taken is None or not taken.losses or not math.isfinite(taken.losses[0]):
        return
    first, losses = taken.losses[0], taken.losses
    changes = [c for c in taken.changes.values() if math.isfinite(c)]
    change = median(changes) if changes else float("nan")
    diverged = not all(map(math.isfinite, losses)) or max(losses[1:], default=first) > max(
        DIVERGES * first, first + RISES
    )
    if diverged or (changes and change > FAST):
        yield Finding(
            "rate-too-high",
            "error",
            "The loss rises in the optimizer's first steps"
            if diverged
            else "A step changes the weights by their own size",
            where="optimizer",
            evidence=f"on a copy: loss {', '.join(f'{v:.3g}' for v in losses)}; the median matrix changes by "
            f"{change:.2g} of its size in the first step",
            cause=f"The rate {taken.rate:g} is too large for this model.",
            advice="Divide the rate by 10 or more, or call gm.suggest_lr.",
        )
    elif changes and change < SLOW and taken.gradient > 0 and losses[-1] > NO_PROGRESS * first and first > SOLVED:
        yield Finding(
            "rate-too-low",
            "warning",
            "The optimizer's steps hardly change the weights",
            where="optimizer",
            evidence=f"on a copy, a step changes the median matrix by {change:.1e} of its size; "
            f"loss {first:.4g} → {losses[-1]:.4g} in {len(losses) - 1} steps",
            cause=f"The rate {taken.rate:g} is too small for this model.",
            advice="Multiply the rate by 10 or more, or call gm.suggest_lr.",
        )


def _momentum(group: dict[str, Any]) -> float:
    betas = group.get("betas")
    value = betas[0] if betas else group.get("momentum", 0.0)
    return float(value or 0.0)


def _is_decoupled(optimizer: Any, group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay")) or "AdamW" in type(optimizer).__name__


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (covered, settings, steps)
