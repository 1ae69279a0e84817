"""Parameters in their groups: routed when they are given, followed where a wrapper replaces them, explained."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.optim.health import Skipped
from gramian.optim.options import LR, REST_LR, SHARED, Shared, check
from gramian.optim.parameters import check_caller, reason_to_leave_out, replacements
from gramian.optim.recipe import Recipe
from gramian.optim.refresh import Clock
from gramian.optim.routing import Group, Route, route_groups, routes_of_model
from gramian.optim.scaling import num_in_sequence, usual_kernel_lr, usual_table_lr
from gramian.optim.sharding import Sharding
from gramian.optim.stacks import Stacks

__all__ = ["Grouped"]


class Grouped(torch.optim.Optimizer):
    """The parameters of a matrix optimizer, with the route of each: groups of matrices, of tables, and of vectors.

    For the arguments see `gramian.optim.shell.MatrixOptimizer`, which steps them.
    """

    recipe: Recipe

    def __init__(
        self, params: nn.Module | Iterable[Any], lr: float, options: dict[str, Any], **shared: Unpack[Shared]
    ) -> None:
        assert options.keys() == self.recipe.options.keys(), "recipe.options and __init__ name different options"
        check_caller(type(self).__name__)
        for key in shared.keys() - SHARED.keys():
            known = ", ".join(["lr", *options, *SHARED])
            raise InputError(f"{type(self).__name__}: there is no option {key!r}; there are {known}")
        given: dict[str, Any] = {key: option.default for key, option in SHARED.items()} | shared
        self._check({"lr": lr, **options, **given})
        self._routes: dict[Tensor, Route] = {}
        self._order: list[Tensor] = []  # the parameters in the order given; that of `_routes` is by role
        self._left_out: list[Route] = []
        self._skipped = Skipped()
        self._stacks: dict[int, Stacks] = {}  # by the number of their group
        self._sharding = Sharding()
        self._clock = Clock()
        overrides, layouts, model = given.pop("routes"), given.pop("layouts"), given.pop("model")
        self._options = {"lr": lr, **options, **given}
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise InputError("model= is for lists of parameters; params is a model itself, and another one")
            model = params
        if layouts and model is None:
            raise InputError("layouts= needs the model: pass it in place of its parameters, or as model=")
        self._known = {} if model is None else {r.parameter: r for r in routes_of_model(model, layouts)}
        self._model = None if model is None else weakref.ref(model)
        found = self._cut(route_groups(params, overrides, self._known))
        self._add_routes([r for routes, _ in found for r in routes])
        if isinstance(params, nn.Module):
            self._order = [p for p in params.parameters() if p in self._routes]
        self._built = False
        super().__init__([group for routes, own in found for group in self._split(routes, own)], {})
        self._built, self._is_new = True, True
        self._rates = [group["lr"] for group in self.param_groups]
        # Schedulers that cycle the momentum look for it here.
        self.defaults = {key: self._options[key] for key in ("lr", "momentum") if key in self._options}

    def _check(self, options: Mapping[str, Any]) -> None:
        shared = {key: option.range for key, option in SHARED.items()}
        check(type(self).__name__, options, {"lr": LR, **self.recipe.options, **shared})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, routed as those before: one group of matrices, and groups for the rest."""
        if not self._built:
            super().add_param_group(param_group)
            return
        found = self._cut(route_groups([param_group], known=self._known, first=len(self._routes)))
        for routes, own in found:
            if any(r.parameter in self._routes for r in routes):
                raise InputError(f"{type(self).__name__}: a parameter of the new group is in the optimizer already")
            groups = self._split(routes, own)
            self._add_routes(routes)
            for group in groups:
                super().add_param_group(group)
                self._rates.append(group["lr"])

    def _cut(self, groups: Sequence[Group]) -> list[Group]:
        """The groups without what is left out, and with large matrices in parts."""
        found: list[Group] = []
        for routes, own in groups:
            reasons = [reason_to_leave_out(r.name, r.parameter) for r in routes]
            pairs = list(zip(routes, reasons, strict=True))
            self._left_out += [replace(r, layout=None, reason=reason) for r, reason in pairs if reason]
            found.append(([r.cut(self._options["part_size"]) for r, reason in pairs if not reason], own))
        return found

    def _add_routes(self, routes: Sequence[Route]) -> None:
        self._order += [r.parameter for r in routes]
        self._routes.update((r.parameter, r) for r in routes)
        matrices = [r for r in self._routes.values() if r.layout is not None]
        trained = [r for r in matrices if r.parameter.requires_grad] or matrices
        self._num_matrices = num_in_sequence((r.name, r.whole or r.layout) for r in trained if r.layout is not None)
        self._sharding.assign([r.parameter for r in matrices])

    def _split(self, routes: Sequence[Route], own: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Parameter groups for routes that share the options `own`: matrices, tables, depthwise kernels, vectors."""
        known = self._options.keys() - {"max_overhead", "part_size"}
        for key in own.keys() - known:
            raise InputError(f"{type(self).__name__}: a group has no option {key!r}; it has {', '.join(known)}")
        options = self._options | dict(own)
        if "weight_decay" in own:
            options["rest_weight_decay"] = own["weight_decay"]
        self._check(options)
        lr = float(options["lr"])
        rest_lr, rest_decay, betas, eps = (options.pop(f"rest_{key}") for key in ("lr", "weight_decay", "betas", "eps"))
        matrices = [r for r in routes if r.direction == "matrix"]
        tables = [r for r in routes if r.direction == "adamw" and r.parameter.ndim >= 2]
        vectors = [r for r in routes if r.direction == "adamw" and r.parameter.ndim < 2]
        table_lr = kernel_lr = rest_lr
        kernels = [r for r in tables if r.role == "elementwise" and r.whole is not None]
        if rest_lr is None:
            rest_lr = table_lr = kernel_lr = lr if options["scale"] == "match_rms_adamw" else REST_LR
            if options["scale"] == "spectral":
                kernel_lr = usual_kernel_lr(r.whole.matrices[-1] for r in kernels if r.whole is not None)
                if any(r.role == "embedding" for r in tables):
                    table_lr = usual_table_lr(r.parameter for r in tables)
        if kernel_lr == table_lr:
            kernels = []  # they stay with the tables
        tables = [r for r in tables if r not in kernels]
        # Vectors of all layers move at once, as the matrices do, so that they share the change of the function too.
        shares = options["scale"] == "spectral" and self._num_matrices
        vector_lr = min(rest_lr, lr / self._num_matrices) if shares else rest_lr
        groups: list[dict[str, Any]] = []
        if matrices:
            groups.append({"params": _named(matrices), "direction": "matrix", **options, "lr": lr, "step": 0})
        for rest, rate, decay in (
            (tables, table_lr, rest_decay),
            (kernels, kernel_lr, rest_decay),
            (vectors, vector_lr, 0.0),
        ):
            if rest:
                own_rest = {"lr": float(rate), "weight_decay": decay, "betas": betas, "eps": eps}
                kind = {"direction": "adamw", "maximize": options["maximize"], "fused": True}
                groups.append({"params": _named(rest), **kind, **own_rest})
        return groups

    def _follow(self) -> None:
        """Takes over parameters that a wrapper put into the groups in place of those given, such as their shards."""
        if all(p in self._routes for group in self.param_groups for p in group["params"]):
            return
        new = {old: p for group in self.param_groups for old, p in replacements(group, self._routes).items()}
        if any(self.state.get(p) for p in new):
            raise InputError(
                "the parameters were replaced after the optimizer had stepped them, and its state is that of the old "
                "ones. Replace them (accelerator.prepare, fully_shard) before the first step, then load the state"
            )
        moved = {new.get(p, p): replace(r, parameter=new.get(p, p)) for p, r in self._routes.items()}
        self._routes, self._order = moved, [new.get(p, p) for p in self._order]
        self._known = {p: moved[p] for old in self._known if (p := new.get(old, old)) in moved}
        self._stacks.clear()
        self._sharding = Sharding()
        self._sharding.assign([r.parameter for r in moved.values() if r.layout is not None])

    def explain(self) -> list[dict[str, str]]:
        """Each parameter's name, direction (`"matrix"`, `"adamw"`, `"none"`), matrices, parts, and the reason."""
        return [
            {
                "name": r.name,
                "direction": r.direction,
                "matrices": "" if r.layout is None else " × ".join(map(str, r.matrices)),
                "parts": "" if r.layout is None else " × ".join(map(str, r.layout.matrices)),
                "reason": r.reason,
            }
            for r in self._routes.values()
        ] + [
            {"name": r.name, "direction": "none", "matrices": "", "parts": "", "reason": r.reason}
            for r in self._left_out
        ]


def _named(routes: Sequence[Route]) -> list[tuple[str, Tensor]]:
    return [(r.name, r.parameter) for r in routes]
