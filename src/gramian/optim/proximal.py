"""Proximal steps: those of any optimizer, followed by the proximal maps of penalties."""

from __future__ import annotations

import fnmatch
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gramian.block import Layout, blocks
from gramian.errors import InputError, UnsupportedError
from gramian.optim.routing import plain_layout
from gramian.optim.shell import MatrixOptimizer
from gramian.prox import L2, Penalty

__all__ = ["Proximal"]


class Proximal(torch.optim.Optimizer):
    """Steps `base`, then applies the proximal map of each parameter's penalty: `W ← prox(W − lr·direction, lr)`.

    `lr` is the parameter's rate at the time of the step (its group's, or what a gramian base has for it), so that
    schedulers act on both halves.
    `param_groups`, `state` and `state_dict()` are those of the base. A parameter without a gradient does not change,
    nor does one that a gramian base skipped because its gradient was not finite.

    With plain gradient descent of a convex loss and lr ≤ 1/L this is ISTA and reaches the minimizer of
    loss + penalty. Under any other metric (Adam, Muon) the Euclidean proximal map is a heuristic: zeros and ranks are
    exact, but the fixed point is not that minimizer.

    Args:
        base: any torch or gramian optimizer, built from the model (`Muon`) or from its `named_parameters()`, so that
            parameters have names. `"*"` alone needs no names.
        penalties: `gm.prox` penalties by name pattern, `{"*.weight": gm.prox.L1(1e-4)}`; the first match wins, and
            parameters that match none take the base's step only. `L2(…, form="coupled")` is added to the gradient
            before the step.
        model: tells which matrices a parameter holds (`gm.blocks`), for penalties of matrices. Without it a tensor of
            two or more dimensions is one matrix `(out, in·…)`.
    Raises:
        InputError: for a pattern that matches nothing, a base without names, or a matrix penalty on a vector.
    Cost: the base's step and a proximal map for each parameter that has one (a float64 SVD for penalties of matrices).
    Source: Beck and Teboulle, SIAM J. Imaging Sci. 2 (2009), eq. 3.2, theorem 3.1.

    >>> from gramian import prox
    >>> net = nn.Linear(3, 1)
    >>> sgd = torch.optim.SGD(net.named_parameters(), lr=0.1)
    >>> optimizer = Proximal(sgd, {"weight": prox.L1(100.0)})
    >>> net(torch.ones(2, 3)).square().mean().backward()
    >>> optimizer.step()
    >>> net.weight.tolist()
    [[0.0, 0.0, 0.0]]
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        penalties: Mapping[str, Penalty],
        *,
        model: nn.Module | None = None,
    ) -> None:
        if not isinstance(base, torch.optim.Optimizer):
            raise InputError(f"Proximal: expected a torch.optim.Optimizer, got {type(base).__name__}.")
        for pattern, penalty in penalties.items():
            if not isinstance(penalty, Penalty):
                raise InputError(f"Proximal: expected a gm.prox penalty for {pattern!r}, got {penalty!r}.")
        self.base = base
        self.penalties = dict(penalties)
        self._layouts: dict[Tensor, Layout] = (
            {b.parameter: b.layout for b in blocks(model).blocks} if model is not None else {}
        )
        self._names: dict[Tensor, str] = {}
        self._chosen = self._choose(unmatched="raise")
        self._params = self._all_parameters()
        super().__init__(base.param_groups, base.defaults)
        self._share()

    def __repr__(self) -> str:
        penalties = ", ".join(f"{pattern}: {penalty!r}" for pattern, penalty in self.penalties.items())
        base = repr(self.base) if isinstance(self.base, MatrixOptimizer) else type(self.base).__name__
        return f"<Proximal: {penalties}; after {base}>"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps the base, then maps every parameter that has a penalty and a gradient; returns the closure's loss."""
        self._follow()
        loss = None
        coupled = {p: x for p, x in self._chosen.items() if isinstance(x, L2) and x.form == "coupled"}
        if coupled and closure is not None:
            # Called here, once, since the penalty is added to the gradient between the closure and the step.
            with torch.enable_grad():
                loss, closure = closure(), None
        held = [(p, p.grad) for p in coupled if p.grad is not None]
        for p, grad in held:
            p.grad = grad.add(p, alpha=coupled[p].strength)
        with _without_global_hooks():
            stepped = self.base.step(closure) if closure is not None else self.base.step()
        for p, grad in held:
            p.grad = grad
        skipped = self.base.skipped() if isinstance(self.base, MatrixOptimizer) else {}
        rates = self.base._rates() if isinstance(self.base, MatrixOptimizer) else {}
        for group in self.param_groups:
            for p in group["params"]:
                if p in self._chosen and p not in coupled and p.grad is not None:
                    mapped = self._prox(p, self._chosen[p], rates.get(p, float(group["lr"])))
                    p.copy_(torch.where(skipped[p], p, mapped) if p in skipped else mapped)
        return loss if loss is not None else stepped

    def penalty(self) -> Tensor:
        """The sum of the penalties of all parameters, to report with the loss; differentiable.

        >>> from gramian import prox
        >>> net = nn.Linear(2, 1, bias=False)
        >>> optimizer = Proximal(torch.optim.SGD(net.parameters(), lr=0.1), {"*": prox.L1(2.0)})
        >>> bool(optimizer.penalty() == 2 * net.weight.abs().sum())
        True
        """
        values = [
            penalty.penalty(self._layout(p).split(p) if penalty.of_matrix else p).sum()
            for p, penalty in self._chosen.items()
        ]
        return torch.stack(values).sum() if values else torch.zeros(())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base, and matches its names against the patterns."""
        if not hasattr(self, "_shared"):  # torch's own constructor, on the base's groups
            super().add_param_group(param_group)
            return
        self.base.add_param_group(param_group)
        self._share()
        self._chosen = self._choose(unmatched="ignore")
        self._params = self._all_parameters()

    def state_dict(self) -> dict[str, Any]:
        """The base's, through the hooks of both."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = self.base.state_dict()
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a `state_dict()` of this optimizer or of the base, through the hooks of both."""
        state = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        self.base.load_state_dict(state)
        self._share()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ("base", "penalties", "_layouts", "_names", "_chosen", "_params")
        return super().__getstate__() | {name: self.__dict__[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Shares the groups and the state with the base."""
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        self._shared = True

    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"]]

    def _follow(self) -> None:
        """Gives the penalties to parameters that a wrapper has put in place of those given, as accelerate does."""
        now = self._all_parameters()
        if len(now) != len(self._params):
            raise UnsupportedError(
                f"Proximal: the base has {len(now)} parameters now and had {len(self._params)}. Add groups to the "
                "Proximal, not to its base; wrappers that flatten parameters, as DeepSpeed's ZeRO, are not supported"
            )
        new = {old: p for old, p in zip(self._params, now, strict=True) if p is not old}
        if new:
            self._chosen = {new.get(p, p): penalty for p, penalty in self._chosen.items()}
            self._layouts = {new.get(p, p): layout for p, layout in self._layouts.items()}
            self._names = {new.get(p, p): name for p, name in self._names.items()}
            self._params = now

    def _choose(self, *, unmatched: str) -> dict[Tensor, Penalty]:
        chosen: dict[Tensor, Penalty] = {}
        used: set[str] = set()
        names: list[str] = []
        for group in self.base.param_groups:
            known = group.get("param_names")
            unnamed = known is None and not all(p in self._names for p in group["params"])
            if unnamed and set(self.penalties) - {"*"}:
                raise InputError(
                    "Proximal: the base optimizer's parameters have no names to match "
                    f"{sorted(self.penalties)} against. Build it from model.named_parameters()."
                )
            for p, given in zip(group["params"], known or [""] * len(group["params"]), strict=True):
                # The name at construction: a state that is loaded may bring others into the groups.
                name = self._names.setdefault(p, given)
                names.append(name)
                pattern = next((x for x in self.penalties if fnmatch.fnmatchcase(name, x)), None)
                if pattern is None:
                    continue
                used.add(pattern)
                penalty = self.penalties[pattern]
                if penalty.of_matrix and p.ndim < 2:
                    raise InputError(
                        f"Proximal: {pattern!r} gives {type(penalty).__name__} to {name!r} of shape {tuple(p.shape)}, "
                        "which holds no matrix. Narrow the pattern, as in '*.weight'."
                    )
                chosen[p] = penalty
        for pattern in self.penalties:
            if pattern not in used and unmatched == "raise":
                raise InputError(f"Proximal: {pattern!r} matches no parameter; names are like {names[0]!r}.")
        return chosen

    def _layout(self, p: Tensor) -> Layout:
        layout = self._layouts.get(p) or plain_layout(p)
        assert layout is not None
        return layout

    def _prox(self, p: Tensor, penalty: Penalty, lr: float) -> Tensor:
        if not penalty.of_matrix:
            return penalty.prox(p, lr)
        layout = self._layout(p)
        return layout.join(penalty.prox(layout.split(p), lr))


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Steps of an optimizer inside another run no hooks of all optimizers, which see the outer one's step."""
    torch_optimizer = sys.modules[torch.optim.Optimizer.__module__]
    names = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    kept = {name: getattr(torch_optimizer, name) for name in names}
    try:
        for name in names:
            setattr(torch_optimizer, name, OrderedDict())
        yield
    finally:
        for name, hooks in kept.items():
            setattr(torch_optimizer, name, hooks)
