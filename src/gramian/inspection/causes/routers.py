"""Causes in what chooses among modules: routers that send nothing to some of their experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.inspection.passes.records import Routing
from gramian.report import Action, Finding
from gramian.report.formatting import plural

__all__ = ["RULES", "Idle", "idle_experts"]

# Largest weight of an expert that is never chosen, and rows for each expert from which on that is no chance: of experts
# that are chosen alike, one stays without any of 10 rows for each once in 20,000.
NEVER, ROWS = 1e-4, 10


@dataclass(frozen=True)
class Idle:
    """Modules of a list that a router never chooses.

    Attributes:
        routing: the scores by which it chooses.
        router: the module whose matrix gives them.
        experts: the list.
        numbers: of those that are not chosen.
    """

    routing: Routing
    router: str
    experts: str
    numbers: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """Of the modules that are not chosen."""
        return [f"{self.experts}.{i}" for i in self.numbers]

    @property
    def is_chance(self) -> bool:
        """Whether there are too few rows to say."""
        return self.routing.rows < ROWS * len(self.routing.largest)


def idle_experts(context: Context) -> list[Idle]:
    """The modules that routers never choose, among as many of one kind as they give scores.

    A choice of the largest scores counts where the parameters of what it leaves out get no gradient from any batch.

    Args:
        context: what was seen.

    Returns: one for each list of modules.
    Cost: linear in the modules for each routing.
    """
    found: dict[str, Idle] = {}
    gradients = context.observed.gradients
    lists = [(name, m) for name, m in context.modules.items() if isinstance(m, nn.ModuleList)]
    lists = [(n, m) for n, m in lists if len({type(e) for e in m}) == 1 and any(True for _ in m.parameters())]
    chosen = {one.sources for one in context.observed.routings if one.is_choice}
    for routing in context.observed.routings:
        num = len(routing.largest)
        routers = [s.name for s in routing.sources if not s.is_bias and len(context.parameters[s.name]) == num]
        if not routers or (routing.sources in chosen and not routing.is_choice):
            continue
        router = context.module_of(routers[0])
        beside = _nearest([name for name, m in lists if len(m) == num], router)
        never = [i for i, weight in enumerate(routing.largest) if weight < NEVER]
        if len(beside) != 1 or not never:
            continue
        owned = [[n for n in gradients if n.startswith(f"{beside[0]}.{i}.")] for i in never]
        if routing.is_choice:
            never = [i for i, names in zip(never, owned, strict=True) if all(gradients[n] is None for n in names)]
        if never:
            found.setdefault(beside[0], Idle(routing, router, beside[0], tuple(never)))
    return list(found.values())


def _nearest(names: list[str], router: str) -> list[str]:
    """Those that share the longest way from the model down with a router."""

    def shared(name: str) -> int:
        pairs = zip(name.split("."), router.split("."), strict=False)
        return next((i for i, (one, other) in enumerate(pairs) if one != other), 0)

    most = max(map(shared, names), default=0)
    return [name for name in names if shared(name) == most]


def experts(context: Context) -> Iterator[Finding]:
    """Find modules that a router never chooses."""
    found = [idle for idle in idle_experts(context) if idle.routing.is_choice or not idle.is_chance]
    if not found:
        return
    first = min(found, key=lambda idle: idle.is_chance)
    routing, num, never = first.routing, len(first.routing.largest), first.numbers
    offsets = {idle.router: _offset(context, idle.router) for idle in found}
    weight = context.parameters.get(f"{first.router}.weight")
    is_zero = weight is not None and not bool(weight.detach().any())
    by_bias = [router for router, offset in offsets.items() if offset > (0.0 if is_zero else -math.log(NEVER))]
    begins, is_grave = is_zero and not by_bias, 2 * len(never) >= num
    yield Finding(
        "gate-shut",
        "info" if context.has_learned or first.is_chance or begins else "error" if is_grave else "warning",
        f"{context.told(first.router)} never chooses {len(never)} of {num} modules of {first.experts}"
        + (f"; so it is with {plural(len(found) - 1, 'other router')}" if len(found) > 1 else ""),
        where=some([name for idle in found for name in (idle.router, *idle.names)], SHOWN),
        evidence=(
            f"none of {routing.rows:,} choices of the largest scores is one of these, and no batch gives their "
            "parameters a gradient (exact)"
            if routing.is_choice
            else f"their largest weight of {routing.rows:,} rows is {max(routing.largest[i] for i in never):.1g}, that "
            f"of the others {max(routing.largest):.3g} (exact)"
        )
        + (f"; the router's biases differ by {offsets[first.router]:.3g}" if first.router in by_bias else ""),
        cause="So few rows are sent somewhere that some modules stay without any."
        if first.is_chance
        else "The router starts at zero, so that all scores are equal and the first modules are chosen."
        if begins
        else "The router's bias outweighs what it sees of the inputs: what it does not choose gets no gradient."
        if by_bias
        else "The router's scores are far apart for all inputs: what it does not choose gets no gradient.",
        action=Action("reset", {"names": tuple(f"{router}.bias" for router in by_bias)}) if by_bias else None,
        advice="Start the router with small scores, and add a loss that balances the load.",
        source="Shazeer et al. 1701.06538, §4",
    )


def _offset(context: Context, router: str) -> float:
    """How far a router's biases are apart."""
    bias = context.parameters.get(f"{router}.bias")
    return 0.0 if bias is None else float(bias.detach().float().amax() - bias.detach().float().amin())


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (experts,)
