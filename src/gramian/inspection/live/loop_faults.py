"""What only the user's own loop shows: gradients that are kept, dropped or clipped, frozen layers, and the rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gramian.errors import some
from gramian.inspection.live.clipping import Clipping
from gramian.inspection.live.gradients import norms
from gramian.inspection.passes.step_records import Observed
from gramian.report import Finding

__all__ = ["Loop"]

# Looks from which on a parameter counts as unused that had no gradient at any step since the first: fewer may be steps
# in which a layer is dropped at random.
LOOKS = 4
# A rate has grown that is so many times the largest that its schedule starts from; and has vanished that is this share
# of the largest for this share of all steps. A cosine is below it in the last 0.6 %.
GROWN, VANISHED, LONG = 30.0, 1e-4, 0.1
# Parameters are frozen too early that have this share of all values, where a step still changed a matrix by this much
# of its size: AdamW's first steps at 1e-3 make 0.02, a fine-tune's 1e-4.
MANY, LEARNING = 0.1, 1e-3
# Names that a finding spells out.
SHOWN = 6


class Loop:
    """Follows the gradients of the first and last parameter that the optimizer has, through steps that are looked at.

    Args:
        parameters: those that are trained, by name.
        optimizer: that steps them, or `None`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        self.parameters, self.optimizer = parameters, optimizer
        self._ends: list[nn.Parameter] = []
        self._handles: list[Any] = []
        self._arrived: dict[int, list[tuple[float, bool]]] = {}  # size, and whether the last step's gradient was there
        self._missed: dict[str, int] = {}
        self._pending = dict(parameters)  # those that got no gradient at any step so far
        self._largest = [_base(group) for group in self._groups]
        self._vanished: list[int | None] = [None] * len(self._groups)
        self.changes: dict[str, float] = {}  # ‖ΔW‖_F / ‖W‖_F of each matrix, when it was last looked at
        self.clipping = Clipping()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups if self.optimizer is not None else []

    def _moved(self) -> list[nn.Parameter]:
        """The parameters that the optimizer has: of others, it zeroes no gradient."""
        moved = {id(p) for group in self._groups for p in group["params"]}
        return [p for p in self.parameters.values() if id(p) in moved]

    def follow(self) -> None:
        """Sees the gradients that arrive until the step; nothing is done to them."""
        if not self._handles and self.optimizer is not None:
            ends = self._moved()
            self._ends = [*{id(p): p for p in (*ends[:1], *ends[-1:])}.values()]
            self._handles = [p.register_hook(self._hook(p)) for p in self._ends if p.requires_grad]

    def note(self) -> None:
        """Notes which parameters have a gradient, at every step: of those that never had one, usually none."""
        self._pending = {n: p for n, p in self._pending.items() if p.grad is None}

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._arrived.clear()

    def _hook(self, parameter: nn.Parameter) -> Any:
        def arrive(gradient: Tensor) -> None:
            there = {"new": gradient} | ({} if parameter.grad is None else {"old": parameter.grad})
            sizes = norms(there)
            self._arrived.setdefault(id(parameter), []).append((sizes["new"], sizes.get("old", 0.0) > 0.0))

        return arrive

    def judge(self, seen: Observed, passes: int, step: int, *, scaled: bool) -> list[Finding]:
        """The findings before the step, of gradients that arrived in this one; then what arrived is forgotten.

        Args:
            seen: has the gradients that the step gets; those of parameters that have not been missing for long, or are
                frozen now, are taken out.
            passes: forward passes in training that this step is made of.
            step: the number of steps that were taken before.
            scaled: whether the gradients are those of a loss times a scale, as they may be in float16 anyway.
        """
        self.clipping.is_narrow |= seen.is_narrow
        found = [
            *self._frozen(seen),
            *self._gradients(seen, step, scaled=scaled),
            *self._unlinked(passes, step),
            *self.grown(step),
            *self._fallen(step),
        ]
        self._forgive(seen)
        self.close()
        return found

    def _unlinked(self, passes: int, step: int) -> Iterator[Finding]:
        """The finding that no parameter had a gradient at any step, nor got one in this."""
        if step + 1 < LOOKS or not self._moved() or self._arrived or self._pending != self.parameters:
            return
        if not passes:
            yield Finding(
                "graph-cut",
                "error",
                "No gradient arrives at any parameter, and no forward pass of this model was seen",
                where="loss",
                evidence=f"{len(self._pending)} of {len(self.parameters)} parameters had no gradient at any of the "
                f"{step + 1} steps so far (exact)",
                cause="The loop calls another object, such as a copy of the model, and the optimizer steps the "
                "parameters of this one.",
                advice="Call the model whose parameters the optimizer has, or make the optimizer for the one called.",
            )
        elif self._handles:
            yield Finding(
                "graph-cut",
                "error",
                "No gradient arrives at any parameter",
                where="loss",
                evidence=f"{len(self._pending)} of {len(self.parameters)} parameters had no gradient at any of the "
                f"{step + 1} steps so far, though forward passes were made (exact)",
                cause="The loss that backward() is called of is not linked to the model: a .item(), .detach() or "
                "torch.tensor(loss) made a new one, or backward() is not called.",
                advice="Call backward() of the loss itself, as it was computed from the model's output.",
            )

    def _gradients(self, seen: Observed, step: int, *, scaled: bool) -> Iterator[Finding]:
        given = {id(p): 0.0 if p.grad is None else norms({"g": p.grad})["g"] for p in self._ends}
        arrived = [all_of for all_of in self._arrived.values() if any(size > 0 for size, _ in all_of)]
        if not arrived:
            return
        if not any(seen.gradients.values()) and not any(given.values()):
            seen.gradients.clear()
            yield Finding(
                "gradient-dropped",
                "error",
                "The gradients are gone when the optimizer makes its step",
                where="optimizer",
                evidence=f"gradients arrived, and at step {step + 1} all are zero or None (exact)",
                cause="zero_grad() is called between backward() and step(), so that no weight moves.",
                advice="Call zero_grad() before backward(), or after step().",
            )
            return
        if step and all(old for all_of in arrived for _, old in all_of):
            yield Finding(
                "gradient-kept",
                "error",
                "The gradients are not zeroed: each step adds to those of all steps before",
                where="optimizer",
                evidence=f"{sum(map(len, arrived))} gradients that arrived for step {step + 1} were added to others, "
                "the first after the last step too (exact)",
                cause="zero_grad() is not called, so that steps follow the sum of all gradients since the start.",
                advice="Call optimizer.zero_grad() after each step.",
            )
            return
        sizes = {n: g for n, g in seen.gradients.items() if g}
        size = math.hypot(*[g * math.sqrt(self.parameters[n].numel()) for n, g in sizes.items()])
        shares = [given[i] / all_of[0][0] for i, all_of in self._arrived.items() if len(all_of) == 1 and all_of[0][0]]
        known = shares if len(shares) == len(self._arrived) else []
        yield from self.clipping.judge(size, known, self._groups, sizes.values(), step, scaled=scaled)

    def _frozen(self, seen: Observed) -> Iterator[Finding]:
        names = [n for n, p in self.parameters.items() if not p.requires_grad]
        for name in names:
            seen.gradients.pop(name, None)
        if names:
            share = sum(self.parameters[n].numel() for n in names) / sum(p.numel() for p in self.parameters.values())
            change = median([self.changes[n] for n in names if n in self.changes] or [0.0])
            is_early = share >= MANY and change >= LEARNING
            yield Finding(
                "parameter-frozen",
                "warning" if is_early else "info",
                f"{len(names)} of {len(self.parameters)} parameters were frozen while they were watched",
                where=some(list(dict.fromkeys(n.rpartition(".")[0] or n for n in names)), SHOWN),
                evidence=f"requires_grad is False now, and was True when the watch began: {some(names, SHOWN)} (exact)"
                + (f"; {share:.0%} of all values, which a step still changed by {change:.1e}" if is_early else ""),
                cause="The loop, or a callback, calls requires_grad_(False)"
                + (", while these layers were still learning." if is_early else "."),
                advice="Freeze them later, or not, unless it is meant." if is_early else "",
            )

    def _forgive(self, seen: Observed) -> None:
        """Takes out of what is missing the parameters that may be missing by chance: those of layers dropped so."""
        for name, size in [*seen.gradients.items()]:
            if size is None and name not in seen.used:
                self._missed[name] = self._missed.get(name, 0) + 1
                if name not in self._pending or self._missed[name] < LOOKS:
                    del seen.gradients[name]

    def _rates(self) -> Iterator[tuple[int, str, float, float]]:
        """Of each group its number, place, rate, and the largest that its schedule starts from."""
        for i, group in enumerate(self._groups[: len(self._largest)]):
            where = "optimizer" if len(self._groups) == 1 else f"optimizer's group {i}"
            yield i, where, float(group["lr"]), self._largest[i]

    def grown(self, step: int) -> Iterator[Finding]:
        """The finding that a rate has grown, which is a fault only where it does harm."""
        for _, where, rate, before in self._rates():
            if before > 0 and rate > GROWN * before:
                yield Finding(
                    "rate-grows",
                    "warning",
                    f"The learning rate has grown to {rate:.2g}, {rate / before:.3g} times its first value",
                    where=where,
                    evidence=f"lr {rate:.3g} at step {step + 1}; the schedule started from {before:.3g} (exact)",
                    cause="A schedule multiplies the rate by more than 1 at each step, or is stepped more often than "
                    "it was made for.",
                    advice="Look at the schedule, and at where its step() is called.",
                )

    def _fallen(self, step: int) -> Iterator[Finding]:
        for i, where, rate, before in self._rates():
            if not before or rate > VANISHED * before:
                self._vanished[i] = None
                continue
            since = self._vanished[i]
            if since is None:
                self._vanished[i] = step
            elif step - since >= LONG * step:
                yield Finding(
                    "rate-vanished",
                    "warning",
                    f"The learning rate is {rate:.1e}, {rate / before:.1e} of where its schedule began",
                    where=where,
                    evidence=f"lr at most {VANISHED:g} of {before:.3g} since step {since + 1} of {step + 1} (exact)",
                    cause="A schedule lowers the rate too fast: it is stepped at each batch and was made for epochs, "
                    "or its number of steps is too small.",
                    advice="Look at the schedule, and at where its step() is called.",
                )


def _base(group: Mapping[str, Any]) -> float:
    """The largest rate that a group's schedule starts from or says it will reach."""
    known: Sequence[Any] = (group["lr"], group.get("initial_lr", 0.0), group.get("max_lr", 0.0))
    return max(map(float, known))
