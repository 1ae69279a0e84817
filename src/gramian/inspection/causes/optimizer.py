"""Causes in the optimizer: its settings, what it moves, and what its steps do on a copy of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from torch.optim import LBFGS

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.report import Finding

__all__ = ["RULES"]

# Relative change of a matrix in a step, ‖ΔW‖_F / ‖W‖_F: AdamW at 1e-3 makes 0.02 at first, a late step 1e-4.
SLOW, FAST = 1e-4, 0.5
# In a group of several, a change is lost below this: 10,000 such steps change a weight by 1 %.
# The others change by at least this many times as much.
LOST, GAP = 1e-6, 100.0
# Where Adam's ε is this many times the gradient, and so divides the step, a change is slow up to this one: a tenth of
# what AdamW makes at 1e-3. From this ε on it is so whatever the first losses are.
EPSILON, DIVIDED, UNUSUAL = 10.0, 2e-3, 1e-5
# By how much a rate may be below the one that an optimizer takes by itself.
FAR_BELOW = 100.0
# From this change on a rate is too high whatever the first losses are.
ANYHOW = 5.0
# A loss diverges that rises to this many times its first value, and by this much. It makes no progress while it is
# above this share of its first value, unless that was already small.
DIVERGES, RISES, NO_PROGRESS, SOLVED = 3.0, 3.0, 0.9, 0.05
# Steps of a warm-up from which on a rate is lower than one makes it.
LONGEST = 5000.0
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
    groups = context.groups
    trained = {n: p for n, p in context.parameters.items() if p.requires_grad}
    absent = [n for n in trained if n not in groups]
    still = [n for n in trained if n in groups and _rate(groups[n]) == 0.0]
    waiting = [n for n in still if _scheduled(groups[n]) > 0.0]
    names = absent or ([] if waiting else still)
    if names:
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
            "a part of it."
            if absent
            else "The group was given a rate of zero.",
            advice="Make the optimizer with model.parameters() after the model is complete."
            if absent
            else "Set the group's lr.",
        )
    elif waiting:
        taken = _steps_taken(context)
        has_ended = taken > 1 and len(waiting) == len(trained) and not context.has_learned
        yield Finding(
            "parameter-not-stepped",
            "warning" if has_ended else "info",
            f"The rate of {len(waiting)} of {len(trained)} parameters is zero now, by a schedule",
            where="optimizer",
            evidence=f"lr is 0 and the schedule's rate {_scheduled(groups[waiting[0]]):g} (exact)"
            + (f"; {taken} steps were taken" if taken else ""),
            cause="A schedule has ended at zero, and the network has not learned: it counts steps where epochs are "
            "meant, or its factor is zero."
            if has_ended
            else "A warm-up starts at zero, or a decay has ended there. The rate was not judged.",
            advice="Look at the rate over the steps: print scheduler.get_last_lr()." if has_ended else "",
        )


def settings(context: Context) -> Iterator[Finding]:
    """Judge the direction, momentum and weight decay."""
    if context.optimizer is None:
        return
    if any(group.get("maximize") for group in context.optimizer.param_groups):
        yield Finding(
            "loss-maximized",
            "error",
            "The optimizer makes the loss larger",
            where="optimizer",
            evidence="maximize is True (exact)",
            cause="Its steps go along the gradient, and not against it.",
            advice="Leave maximize out, or give the objective that is to be minimized.",
        )
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
    """Judge the rate by what a few steps on a copy did to the loss and to the matrices.

    Of a step of the run itself the losses are not known: nothing is said of an L-BFGS, which searches for its length.
    """
    taken = context.steps
    if taken is None or not all(map(math.isfinite, taken.losses[:1])) or not taken.changes:
        return
    if not taken.losses and isinstance(context.optimizer, LBFGS):
        return
    losses = taken.losses
    first = losses[0] if losses else 0.0
    change = median(taken.changes.values())
    risen = max(losses[1:], default=0.0) > max(DIVERGES * first, first + RISES)
    diverged = risen or not all(map(math.isfinite, losses))
    stuck = bool(losses) and losses[-1] > NO_PROGRESS * first and first > SOLVED
    by_group = sorted(_by_group(context, taken.changes), key=lambda one: one.change)
    if not by_group:
        return  # another model's optimizer, which is said by its own rule
    fastest, slow = by_group[-1], [one for one in by_group if one.change < LOST and not one.is_scheduled]
    if len(slow) < len(by_group) and by_group[len(slow)].change < GAP * max((one.change for one in slow), default=0.0):
        slow = []  # rates that fall from group to group, as they do by layer in a fine-tune
    told = f"on a copy: loss {', '.join(f'{v:.3g}' for v in losses)}" if losses else "measured in the run"
    once = "the first step" if losses else "a step"
    falls = (
        bool(losses) and not stuck and max(losses) <= first
    )  # small weights, as GPT-2's, may change by half and learn
    if diverged or not change <= (ANYHOW if falls else FAST) or (stuck and fastest.change > FAST):
        yield Finding(
            "rate-too-high",
            "error",
            "The loss rises in the optimizer's first steps"
            if diverged
            else f"A step changes the weights{fastest.of} by their own size",
            where=_place(context, fastest),
            evidence=f"{told}; the median matrix{fastest.of} changes by {fastest.change:.2g} of its size in {once}",
            cause=f"The rate {fastest.rate:g}{fastest.of} is too large for this model.",
            advice="Divide the rate by 10 or more, or call gm.suggest_lr.",
        )
    elif _is_slow(fastest, taken.gradient, is_stuck=stuck, is_fresh=bool(losses) and not context.has_learned):
        largest = max(by_group, key=lambda one: len(one.names))
        found = _too_low(context, largest, taken.gradient, told)
        if largest.is_scheduled:  # a warm-up, or the end of a decay, or one that has come too early
            cause = f"A schedule has set the rate to {largest.rate:g}, from or towards {_scheduled(largest.group):g}."
            advice = "Look at whether the schedule is where it should be: it counts steps, or epochs."
            warm_up = (_steps_taken(context) + 1) * _scheduled(largest.group) / largest.rate
            if warm_up > LONGEST and not context.has_learned:
                cause += f" A warm-up that begins so would take {warm_up:,.0f} steps."
                advice += " The function given to LambdaLR returns a factor, by which lr is multiplied, and no rate."
            else:
                found = replace(found, severity="info")
            found = replace(found, cause=cause, advice=advice)
        yield found
    elif slow:
        yield _too_low(context, slow[0], taken.gradient, told)


def far_below(context: Context) -> Iterator[Finding]:
    """Find rates of a matrix optimizer of this library that are another optimizer's: far below its usual one. Exact."""
    usual = getattr(context.optimizer, "usual_lr", None)
    if context.optimizer is None or not isinstance(usual, float) or context.has_learned:
        return
    for group in context.optimizer.param_groups:
        rate = max(_rate(group), _scheduled(group))
        if group.get("scale") == "spectral" and 0 < rate < usual / FAR_BELOW:
            yield Finding(
                "rate-too-low",
                "warning",
                f"The rate of the matrices, {rate:g}, is {usual / rate:,.0f} times below the usual one",
                where="optimizer",
                evidence=f"{type(context.optimizer).__name__} takes {usual:.3g} for this network where no lr is given",
                cause="Its steps have the size lr whatever the gradient: a rate of AdamW's is no rate of this one.",
                advice="Leave lr out, or call gm.suggest_lr.",
            )
            return


@dataclass(frozen=True)
class _Group:
    """A parameter group, by what its first step did."""

    group: dict[str, Any]
    names: list[str]
    change: float  # of the median matrix
    of: str  # which group, in words, where there are several

    @property
    def rate(self) -> float:
        return _rate(self.group)

    @property
    def is_scheduled(self) -> bool:
        """Whether a schedule has set the rate to less than half of what it reaches."""
        return self.rate < 0.5 * _scheduled(self.group)


def _by_group(context: Context, changes: dict[str, float]) -> list[_Group]:
    names: dict[int, list[str]] = {}
    for name in changes:
        if name in context.groups:
            names.setdefault(id(context.groups[name]), []).append(name)
    found = []
    for i, group in enumerate(context.optimizer.param_groups if context.optimizer is not None else ()):
        of = names.get(id(group), [])
        if of:
            words = f" of group {i} ({of[0]}{', …' if len(of) > 1 else ''})" if len(names) > 1 else ""
            values = [changes[n] if math.isfinite(changes[n]) else math.inf for n in of]
            moved = [v for v in values if v > 0]  # others got no gradient, as experts that are not chosen
            found.append(_Group(group, of, median(moved or values), words))
    return found


def _place(context: Context, one: _Group) -> str:
    """The modules of a group where there are several; else the optimizer."""
    modules = list(dict.fromkeys(context.module_of(n) or n for n in one.names))
    return some(modules, SHOWN) if one.of else "optimizer"


def _too_low(context: Context, slow: _Group, gradient: float, told: str) -> Finding:
    """The finding about a rate, or about Adam's ε where that is larger than the gradient."""
    eps = _epsilon(slow)
    return Finding(
        "rate-too-low",
        "warning",
        f"The optimizer's steps hardly change the weights{slow.of}",
        where=_place(context, slow),
        evidence=f"{told}; a step changes the median matrix{slow.of} by {slow.change:.1e} of its size",
        cause=f"Adam's ε of {eps:g} is larger than the gradients, whose entries have a size of {gradient:.1e}: it "
        "divides the step."
        if eps > gradient
        else f"The rate {slow.rate:g}{slow.of} is too small for this model.",
        advice="Use an ε of 1e-8." if eps > gradient else "Multiply the rate by 10 or more, or call gm.suggest_lr.",
    )


def _epsilon(one: _Group) -> float:
    """Adam's ε; 0 for other optimizers."""
    return float(one.group.get("eps", 0.0) or 0.0) if "betas" in one.group else 0.0


def _is_slow(one: _Group, gradient: float, *, is_stuck: bool, is_fresh: bool) -> bool:
    """Whether steps are too small: by the rate where the loss stays, by Adam's ε also where a fresh model's falls."""
    eps = _epsilon(one)
    is_divided = 0 < EPSILON * gradient < eps
    waits = is_stuck or (is_fresh and is_divided and eps >= UNUSUAL)
    return waits and one.change < (DIVIDED if is_divided else SLOW)


def _steps_taken(context: Context) -> int:
    """How many steps the optimizer has taken, as far as its state says."""
    states = context.optimizer.state.values() if context.optimizer is not None else ()
    return max((int(one["step"]) for one in states if isinstance(one, dict) and "step" in one), default=0)


def _rate(group: dict[str, Any]) -> float:
    return float(group.get("lr", 1.0))


def _scheduled(group: dict[str, Any]) -> float:
    """The rate that a schedule starts from, or reaches."""
    return max(float(group.get("initial_lr", 0.0) or 0.0), float(group.get("max_lr", 0.0) or 0.0))


def _momentum(group: dict[str, Any]) -> float:
    betas = group.get("betas")
    value = betas[0] if betas else group.get("momentum", 0.0)
    return float(value or 0.0)


def _is_decoupled(optimizer: Any, group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay")) or "AdamW" in type(optimizer).__name__


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (covered, settings, steps, far_below)
