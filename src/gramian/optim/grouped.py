"""Parameters in the groups that the user gave: routed, followed where a wrapper replaces them, explained."""

from __future__ import annotations

import difflib
import inspect
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.optim.health import Skipped
from gramian.optim.options import RANGES, SHARED, Shared, check
from gramian.optim.parameters import check_caller, reason_to_leave_out, replacements
from gramian.optim.plan import Plan
from gramian.optim.rates import full_rate, rates_of
from gramian.optim.recipe import Recipe
from gramian.optim.refresh import Clock
from gramian.optim.route import Group, Route
from gramian.optim.routing import route_groups, routes_of_model
from gramian.optim.scaling import is_plain, num_in_sequence, usual_lr
from gramian.optim.sharding import Sharding
from gramian.rows import Rows

__all__ = ["Grouped"]

OWN_KEYS = ("params", "param_names", "step", "full_lr", "num_matrices", "fades", "direction", "approaches")
"""What a group holds beside its options and what the user put there."""


class Grouped(torch.optim.Optimizer):
    """The parameters of a matrix optimizer, in the groups that the user gave, with the route of each.

    For the arguments see `gramian.optim.shell.MatrixOptimizer`, which steps them.
    """

    recipe: Recipe

    base_lr: ClassVar[float] = 0.1
    """The rate where none is given, in the signature or here."""

    grows_with_depth: ClassVar[bool] = False
    """Whether that grows with L."""

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | None,
        options: dict[str, Any],
        **shared: Unpack[Shared],
    ) -> None:
        assert options.keys() == self.recipe.options.keys(), "recipe.options and __init__ name different options"
        check_caller(type(self).__name__)
        for key in shared.keys() - SHARED.keys():
            known = ", ".join(["lr", *options, *SHARED])
            raise InputError(f"{type(self).__name__}: there is no option {key!r}; there are {known}")
        given: dict[str, Any] = {key: option.default for key, option in SHARED.items()} | shared
        self._check({"lr": self.base_lr if lr is None else lr, **options, **given})
        self._routes: dict[Tensor, Route] = {}
        self._left_out: list[Route] = []
        self._skipped = Skipped()
        self._plans: dict[int, Plan] = {}  # by the number of their group
        self._sharding = Sharding()
        self._clock = Clock()
        self._num_missing = -1  # parameters without a gradient in the last step; no step has been taken
        overrides, layouts, model = given.pop("routes"), given.pop("layouts"), given.pop("model")
        self._options = {"lr": self.base_lr if lr is None else lr, **options, **given}
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise InputError("model= is for lists of parameters; params is a model itself, and another one")
            model = params
        if layouts and model is None:
            raise InputError("layouts= needs the model: pass it in place of its parameters, or as model=")
        self._known = {} if model is None else {r.parameter: r for r in routes_of_model(model, layouts)}
        self._model = None if model is None else weakref.ref(model)
        self._layouts = layouts
        found = self._cut(route_groups(params, overrides, self._known))
        self._named = any(r.named for routes, _ in found for r in routes)
        self._add_routes(found)
        if isinstance(params, nn.Module):
            # In the order of the model, which is that of an AdamW's state too; `found` is ordered by role.
            order: dict[Tensor, int] = {p: i for i, p in enumerate(params.parameters())}
            found[0][0].sort(key=lambda r: order[r.parameter])
        self._fades = lr is None and self.has_usual_lr
        if lr is None:
            self._options["lr"] = self.usual_lr
        self._built = False
        super().__init__([self._group(routes, own) for routes, own in found], dict(self._options))
        self._built = True

    def _check(self, options: Mapping[str, Any]) -> None:
        check(type(self).__name__, options, {**RANGES, **self.recipe.options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, routed as those before."""
        if not self._built:
            super().add_param_group(param_group)
            return
        model = self._model() if self._model is not None else None
        if model is not None:  # which may have new layers, and tells what they are
            self._known |= {
                r.parameter: r for r in routes_of_model(model, self._layouts) if r.parameter not in self._known
            }
        found = self._cut(route_groups([param_group], known=self._known, first=len(self._routes)))
        ((routes, own),) = found
        if any(r.parameter in self._routes for r in routes):
            raise InputError(
                f"{type(self).__name__}: some parameters appear in more than one parameter group: one of the new group "
                "is in the optimizer already"
            )
        if routes and not self._known and any(r.named for r in routes) != self._named:
            new, old = ("without", "with") if self._named else ("with", "without")
            raise InputError(
                "all optimizer param groups should be with/without names. cannot add param group "
                f"{new} names to the optimizer, whose parameters are {old}"
            )
        super().add_param_group(self._group(routes, own))
        self._add_routes(found)
        for group in self.param_groups:
            group["num_matrices"] = self._num_matrices

    def _cut(self, groups: Sequence[Group]) -> list[Group]:
        """The groups without what is left out, and with large matrices in parts."""
        found: list[Group] = []
        for routes, own in groups:
            reasons = [reason_to_leave_out(r.name, r.parameter) for r in routes]
            pairs = list(zip(routes, reasons, strict=True))
            self._left_out += [replace(r, layout=None, reason=reason) for r, reason in pairs if reason]
            size = own.get("part_size", self._options["part_size"])
            found.append(([r.cut(size) for r, reason in pairs if not reason], own))
        return found

    def _add_routes(self, groups: Sequence[Group]) -> None:
        self._routes.update((r.parameter, r) for routes, _ in groups for r in routes)
        matrices = [r for r in self._routes.values() if r.layout is not None]
        trained = [r for r in matrices if r.parameter.requires_grad] or matrices
        self._num_matrices = num_in_sequence((r.name, r.whole or r.layout) for r in trained if r.layout is not None)
        self._sharding.assign([r.parameter for r in matrices])

    def _group(self, routes: Sequence[Route], own: Mapping[str, Any]) -> dict[str, Any]:
        """The parameter group that a user's group becomes: with the same parameters, and its own keys kept."""
        name = type(self).__name__
        for key in own.keys() - self._options.keys() - {*OWN_KEYS}:
            if near := difflib.get_close_matches(key, self._options, 1, cutoff=0.85):
                raise InputError(f"{name}: a group has no option {key!r}; did you mean {near[0]!r}?")
        options = self._options | {key: value for key, value in own.items() if key in self._options}
        if options["max_overhead"] != self._options["max_overhead"]:
            raise InputError(f"{name}: max_overhead is of the whole optimizer, and no option of a group")
        if "weight_decay" in own:
            options["rest_weight_decay"] = own.get("rest_weight_decay", own["weight_decay"])
        self._check(options)
        kept = {
            "full_lr": full_rate(own, options["lr"], [self._options["lr"], self._usual_lr()]),
            "num_matrices": self._num_matrices,
            "fades": own.get("fades", self._fades and self._num_matrices > 0 and "lr" not in own),
            "direction": self._direction(),
            "step": 0,
        }
        names = {"param_names": [r.name for r in routes]} if self._named else {}
        kept |= self._choices(routes, options)
        return {**own, "params": [r.parameter for r in routes], **names, **options, **kept}

    def _choices(self, routes: Sequence[Route], options: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the recipe decides once for these matrices."""
        matrices = [r for r in routes if r.layout is not None]
        if self.recipe.choose is None and options["approach"] != "predicted":
            raise InputError(f"{type(self).__name__}: approach={options['approach']!r} is for Muon; leave it out")
        if self.recipe.choose is None or not matrices:
            return {}
        parts = [r.layout.matrices for r in matrices if r.layout is not None]
        shapes = [(m, n) for *num, m, n in parts for _ in range(math.prod(num))]
        return self.recipe.choose(shapes, matrices[0].parameter.device, options)

    @classmethod
    def _direction(cls) -> str:
        """The name under which a state is saved: that of the class that has the recipe, for classes made of it too."""
        return next(base.__name__ for base in cls.__mro__ if "recipe" in base.__dict__)

    @property
    def has_usual_lr(self) -> bool:
        """Whether the rate where none is given is one for this network."""
        return self.grows_with_depth and self._options["scale"] == "spectral"

    @property
    def usual_lr(self) -> float:
        """The rate where none is given: of this network, for optimizers whose rate grows with its depth."""
        if self.has_usual_lr:
            return usual_lr(self.base_lr, self._num_matrices, plain=is_plain(self._routes.values()))
        return self._usual_lr()

    @classmethod
    def _usual_lr(cls) -> float:
        default = inspect.signature(cls).parameters["lr"].default
        return cls.base_lr if default is None else 1.0 if default is inspect.Parameter.empty else default

    def _follow(self) -> None:
        """Takes over parameters that a wrapper put into the groups in place of those given, such as their shards."""
        if all(p in self._routes for group in self.param_groups for p in group["params"]):
            return
        given = list(self._routes)
        new = replacements(self.param_groups, self._routes)
        if any(self.state.get(p) for p in new):
            raise InputError(
                "the parameters were replaced after the optimizer had stepped them, and its state is that of the old "
                "ones. Replace them (accelerator.prepare, fully_shard) before the first step, then load the state"
            )
        self._routes = {new.get(p, p): replace(self._routes[p], parameter=new.get(p, p)) for p in given}
        self._known = {p: self._routes[p] for old in self._known if (p := new.get(old, old)) in self._routes}
        self._plans.clear()
        self._sharding = Sharding()
        self._sharding.assign([r.parameter for r in self._routes.values() if r.layout is not None])

    def rates(self) -> dict[str, float]:
        """The rate at which each parameter steps now, by name.

        Matrices step at their group's `lr`; AdamW's rates for the others follow it: where a schedule has halved `lr`,
        they are half of what they were at the start.

        Returns: the rates.

        >>> from gramian.optim import Muon
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> optimizer = Muon(net, lr=0.1, rest_lr=1e-3)
        >>> optimizer.param_groups[0]["lr"] *= 0.5
        >>> {name: optimizer.rates()[name] for name in ("0.weight", "2.weight")}
        {'0.weight': 0.05, '2.weight': 0.0005}
        """
        return {self._routes[p].name: rate for p, rate in self._rates().items()}

    def _rates(self) -> dict[Tensor, float]:
        self._follow()
        return {p: rate for group in self.param_groups for p, rate in rates_of(group, self._routes).items()}

    def __repr__(self) -> str:
        known = [p for g in self.param_groups for p in g["params"] if p in self._routes]
        kinds = Counter(self._routes[p].direction if p.requires_grad else "frozen" for p in known)
        rates = ", ".join(dict.fromkeys(f"{float(g['lr']):.3g}" for g in self.param_groups))
        frozen = f", {kinds['frozen']} are frozen" if kinds["frozen"] else ""
        groups = f" in {len(self.param_groups)} groups" if len(self.param_groups) > 1 else ""
        return (
            f"<{type(self).__name__}: lr={rates}, {kinds['matrix']} parameters step as matrices, {kinds['adamw']} by "
            f"AdamW{frozen}{groups}>"
        )

    def explain(self) -> Rows:
        """Each parameter's name, direction (`"matrix"`, `"adamw"`, `"none"`), matrices, and the reason.

        And `parts`: what large matrices were cut into, where they were. A frozen parameter has no direction; the reason
        tells how it steps once it needs a gradient.
        """
        rows = [
            {
                "name": r.name,
                "direction": r.direction if r.parameter.requires_grad else "none",
                "matrices": "" if r.layout is None else " × ".join(map(str, r.matrices)),
                "parts": "" if r.layout in (None, r.whole) else " × ".join(map(str, r.layout.matrices)),
                "reason": r.reason if r.parameter.requires_grad else f"frozen; else {r.direction}: {r.reason}",
            }
            for r in self._routes.values()
        ]
        empty = {"direction": "none", "matrices": "", "parts": ""}
        return Rows(rows + [{"name": r.name, **empty, "reason": r.reason} for r in self._left_out])
