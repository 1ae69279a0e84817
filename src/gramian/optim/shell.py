"""What all matrix optimizers share: routes, stacks, state, safety, and AdamW for the rest."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from gramian import placement
from gramian.errors import InputError
from gramian.optim.adamw import step_adamw
from gramian.optim.adamw_state import carry_over
from gramian.optim.health import Row, Skipped, measure
from gramian.optim.options import LR, REST_LR, SHARED, Shared, check
from gramian.optim.parameters import (
    check_caller,
    check_gradients,
    check_not_replaced,
    check_state,
    reason_to_leave_out,
    replacements,
    warn_of_one_rate,
)
from gramian.optim.recipe import Recipe, StepContext
from gramian.optim.refresh import Clock, due, stagger
from gramian.optim.routing import Group, Route, route_groups, routes_of_model
from gramian.optim.scaling import num_in_sequence, usual_table_lr
from gramian.optim.sharding import Sharding, not_finite
from gramian.optim.stacks import Stack, Stacks, State, alike

__all__ = ["MatrixOptimizer"]


class MatrixOptimizer(torch.optim.Optimizer):
    """Steps each matrix along a direction D, `W ← (1 − lr·weight_decay) W − lr · s · D`, and the rest by AdamW.

    A subclass declares how D is computed, its `recipe`; everything else is done here.

    A parameter whose gradient is not finite is skipped for that step, with its state, and counted in `health()`; all
    ranks agree. Zero, rank-one and extremely scaled gradients give a finite step (under AdamW, a gradient whose square
    overflows is skipped). A parameter without a gradient does not move.

    The matrices of a sharded parameter (FSDP2) are computed whole, each on one rank, which holds their state;
    `state_dict()` and `load_state_dict()` are collective then. Every rank gets its part of the state, large tensors as
    `DTensor` slices and small ones whole, so that each rank can save its own part, or `torch.distributed.checkpoint`
    all of them, to be loaded by any number of ranks.

    Args:
        params: the model (best: matrices are found by their role), its `named_parameters()` (by name and shape, as in a
            file), or `parameters()`; or torch's parameter groups of these. A group's own `lr`, `weight_decay` and other
            options apply to its matrices and its other parameters alike. Frozen parameters that hold no real numbers
            (quantized weights) are left out; `explain()` says so.
        lr: length of a step of the matrices, in the unit that `scale` sets.
        options: those of the direction, by name.
        shared: the options of all matrix optimizers:

            - `weight_decay`: decoupled, of the matrices.
            - `scale`: `"spectral"`: `s = √(m/n) / L`, where L is the number of matrices that a unit of the function
              passes through (those frozen when they were given do not count; the experts of a layer count once): each
              matrix has the same share in the change of the network's function, so that one rate carries across
              widths and depths. `"match_rms_adamw"`: `s = 0.2 √max(m, n)`,
              so that a rate tuned for AdamW can be reused.
            - `rest_lr`, `rest_betas`, `rest_eps`, `rest_weight_decay`: of AdamW. `rest_lr` is 3e-3 by default (with
              embeddings, their rate and the head's is up to 1e-2 where all are narrower than 800), or `lr` itself with
              `scale="match_rms_adamw"`. With `scale="spectral"`, vectors (biases, norms) take the rate `lr / L` where
              that is less. Vectors do not decay.
            - `part_size`: a matrix whose smaller side is longer is cut along that side into equal parts of at most so
              many rows (or columns). Each part has its own direction, which costs less. `None`: never.
            - `refresh`: steps between two recomputations of a direction's costly parts, staggered over the matrices.
            - `max_overhead`: the largest share of a step's time that the optimizer may take. `refresh` is then set
              once, after nine steps have been timed, by all ranks together; it is kept in `state_dict()` and replayed.
            - `model`: where `params` are its parameters or groups of them: the roles, and the names, are then the
              model's. Without it and without names, whatever has two or more dimensions steps as a matrix, and a
              `GramianWarning` says so.
            - `routes`: overrides by name pattern: `{"0.weight": "matrix", "*.pos_emb": "adamw"}`.
            - `layouts`: as in `gm.blocks`.
            - `maximize`: ascend.

    Raises:
        InputError: for an empty list, a pattern that matches nothing, an unknown option, or one out of its range; in
            `step()`, where the model has other parameters now than the optimizer.
        UnsupportedError: in `step()`, before anything moves: for sparse gradients, and parameters that a wrapper has
            flattened (DeepSpeed's ZeRO, FSDP1). Those that accelerate replaces under FSDP2 are followed.
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
        """Parameter groups for routes that share the options `own`: matrices, tables, vectors."""
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
        table_lr = rest_lr
        if rest_lr is None:
            rest_lr = table_lr = lr if options["scale"] == "match_rms_adamw" else REST_LR
            if options["scale"] == "spectral" and any(r.role == "embedding" for r in tables):
                table_lr = usual_table_lr(r.parameter for r in tables)
        # Vectors of all layers move at once, as the matrices do, so that they share the change of the function too.
        shares = options["scale"] == "spectral" and self._num_matrices
        vector_lr = min(rest_lr, lr / self._num_matrices) if shares else rest_lr
        groups: list[dict[str, Any]] = []
        if matrices:
            groups.append({"params": _named(matrices), "direction": "matrix", **options, "lr": lr, "step": 0})
        for rest, rate, decay in ((tables, table_lr, rest_decay), (vectors, vector_lr, 0.0)):
            if rest:
                own_rest = {"lr": float(rate), "weight_decay": decay, "betas": betas, "eps": eps}
                kind = {"direction": "adamw", "maximize": options["maximize"], "fused": True}
                groups.append({"params": _named(rest), **kind, **own_rest})
        return groups

    @torch._disable_dynamo  # an optimizer's step of its own kernels; torch.compile of a loop goes around it
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._before_step()
        groups = [g for g in self.param_groups if g["direction"] == "matrix"]
        self._skipped.begin()
        with self._clock.timed(groups):
            for number, group in enumerate(groups):
                self._step_matrices(number, group)
            self._count(*step_adamw([g for g in self.param_groups if g["direction"] == "adamw"], self.state))
        return loss

    def _before_step(self) -> None:
        """Refuses what cannot be stepped, before anything moves, and follows parameters that were replaced."""
        self._follow()
        params = [p for group in self.param_groups for p in group["params"]]
        check_gradients(params, self._routes)
        model = self._model() if self._model is not None else None
        if model is not None and (self._is_new or all(p.grad is None for p in params)):
            check_not_replaced(model, self._routes.values())
        self._is_new = False
        if warn_of_one_rate(self.param_groups, self._rates):
            self._rates = []  # once

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

    def _step_matrices(self, number: int, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None and p.grad.numel()]
        if params:
            bad = not_finite([p.grad for p in params])  # type: ignore[misc]
            self._count(params, bad)
            flags = dict(zip(params, bad.unbind(), strict=True))
            for p in params:
                self.state.setdefault(p, {})  # on all ranks, which torch.distributed.checkpoint wants
            grads, updates = self._sharding.gradients(params), {}
            for stack in self._current(number, group, [p for p in group["params"] if p in grads or self._pauses(p)]):
                updates.update(self._step_stack(stack, group, grads, flags))
            self._sharding.add_(params, updates, _decay(params, bad, group["lr"] * group["weight_decay"]))
        group["step"] += 1

    def _pauses(self, p: Tensor) -> bool:
        """Whether a parameter has a state but no gradient in this step: it keeps its place in a stack."""
        return p.grad is None and p.requires_grad and bool(self.state.get(p))

    def _current(self, number: int, group: dict[str, Any], params: Sequence[Tensor]) -> Sequence[Stack]:
        """The stacks of these parameters, with the state as it is now."""
        routes = [self._routes[p] for p in params]
        known = self._stacks.get(number)
        if known is None or not known.fit(routes, group["refresh"], self.state):
            stacks = [Stack(same, lambda m: self.recipe.init(m, group), self.state) for same in alike(routes)]
            for stack in stacks:
                self.state.update((r.parameter, views) for r, views in zip(stack.routes, stack.views, strict=True))
            stagger(stacks, [self._routes[p] for p in group["params"]], group["refresh"])
            known = self._stacks[number] = Stacks(routes, group["refresh"], stacks)
        return known.stacks

    def _step_stack(
        self, stack: Stack, group: dict[str, Any], grads: Mapping[Tensor, Tensor], flags: Mapping[Tensor, Tensor]
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Each parameter of the stack with its update, which is still to be added."""
        params = [r.parameter for r in stack.routes]
        g = stack.stacked([grads.get(p) for p in params])
        missing = torch.ones_like(next(iter(flags.values())))
        bad = stack.repeated(torch.stack([flags.get(p, missing) for p in params]).to(g.device))
        # Bad gradients are masked on the device, without synchronizing; on a CPU, it costs nothing to look first.
        all_alive = g.device.type == "cpu" and not bool(bad.any())
        if not all_alive:
            g.masked_fill_(bad, 0.0)
        if group["maximize"]:
            g.neg_()
        context = StepContext((~bad).to(g.dtype), all_alive, due(stack, group), group)
        direction = self.recipe.update(g, stack.state, context)
        stack.fresh.zero_()
        scales = torch.tensor([self._scale(r, group) for r in stack.routes], dtype=g.dtype, device=g.device)
        update = direction * (context.alive * stack.repeated(-group["lr"] * scales)).to(direction.dtype)
        return zip(params, stack.unstacked(update), strict=True)

    def _scale(self, r: Route, group: Mapping[str, Any]) -> float:
        m, n = r.matrices[-2:]
        return math.sqrt(m / n) / self._num_matrices if group["scale"] == "spectral" else 0.2 * math.sqrt(max(m, n))

    def _count(self, params: list[Tensor], bad: Tensor) -> None:
        if params:
            self._skipped.add([self._routes[p].name for p in params], params, bad)

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

    def skipped(self) -> dict[Tensor, Tensor]:
        """Whether each parameter was skipped in the last step because its gradient was not finite; on its device."""
        return self._skipped.last()

    def health(self, detail: Literal["counts", "spectra"] = "counts") -> dict[str, Row]:
        """What happened to each parameter, by name.

        `skipped`: steps that it missed because its gradient was not finite. `fallbacks`: results that were not good
        enough (inverse roots that were not certified, say), so that the ones before stayed. With `detail="spectra"`
        also three numbers about its matrices, the worst where it holds several; `None` before its first step:

        - `condition`: σ₁/σₘ of the momentum, infinite where it is singular; `None` without a momentum;
        - `effective_rank`: exp(−Σ pᵢ log pᵢ), pᵢ = σᵢ/Σσ, of the momentum: from one to min(m, n);
        - `drift`: the staleness, from 0 to 1, of results that are recomputed only every `refresh` steps: the share of
          the second moment off the diagonal in its basis (SOAP), or the sine of the angle between a direction or root
          that is kept and its present value. `None` where nothing is kept.

        Of a sharded parameter, only the rank that computes its steps reports fallbacks and spectra; others, `None`.

        Cost: counts synchronize with the device once; spectra take a singular value decomposition of each matrix.
        Source: the effective rank: Roy and Vetterli (2007), eq. 3.

        >>> from gramian.optim import Muon
        >>> layer = nn.Linear(3, 2, bias=False)
        >>> optimizer = Muon([("weight", layer.weight)])
        >>> layer.weight.grad = torch.full((2, 3), float("nan"))
        >>> optimizer.step()
        >>> optimizer.health()["weight"]["skipped"]
        1
        """
        if detail not in ("counts", "spectra"):
            raise InputError(f"health: detail must be 'counts' or 'spectra', got {detail!r}")
        self._follow()
        skipped = self._skipped.counts()
        groups = {p: g for g in self.param_groups if g["direction"] == "matrix" for p in g["params"]}
        rows: dict[str, Row] = {}
        for p, r in self._routes.items():
            rows[r.name] = {"skipped": skipped.get(r.name, 0)}
            if p in groups:
                rows[r.name] |= measure(self.state.get(p, {}), self.recipe, groups[p], detail)
        return rows

    def load_adamw(
        self, source: torch.optim.Optimizer | Mapping[str, Any], names: Sequence[str] | None = None
    ) -> list[dict[str, str]]:
        """Continues from the state of an Adam or AdamW, as far as it carries over; reports what did not, and why.

        Parameters that AdamW steps here too take all of it: both moments and the number of steps. Matrices take what
        their direction declares (`Recipe.adamw`), cut into the matrices: the first moment as the momentum, and for
        SOAP, which is Adam in a basis that starts as the identity, also the second. Rates and other options stay this
        optimizer's; its own state is replaced. Collective where parameters are sharded.

        Args:
            source: the optimizer, or its `state_dict()`. Its parameters are found by identity, or by `param_names`
                where it has them, and otherwise by their order: that of `model.parameters()`.
            names: of the parameters of a `state_dict()` without names, in its order: needed where its groups are not
                in the order of the model, as with one group for weights and one for biases.
        Returns: a row for each parameter: `name`, `direction`, `carried`, `lost` and `reason`.
        Raises:
            InputError: for a state that is not Adam's, or whose shapes do not fit.

        >>> from gramian.optim import Muon
        >>> net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        >>> adamw = torch.optim.AdamW(net.parameters())
        >>> net(torch.ones(1, 3)).sum().backward()
        >>> adamw.step()
        >>> for row in Muon(net).load_adamw(adamw)[:2]:
        ...     print(row["name"], "|", row["carried"], "|", row["lost"])
        0.weight | exp_avg | exp_avg_sq, step
        0.bias | exp_avg, exp_avg_sq, step |
        """
        self._follow()
        groups = {p: g for g in self.param_groups for p in g["params"]}

        def empty(r: Route) -> State:
            assert r.layout is not None
            return self.recipe.init(torch.empty(1, *r.layout.matrices[-2:], device="meta"), groups[r.parameter])

        routes = [self._routes[p] for p in self._order]
        maximize = self._options["maximize"]
        states, rows = carry_over(source, names, routes, self._sharding, empty, self.recipe.adamw, maximize)
        self.state.clear()
        self.state.update(states)
        self._stacks.clear()
        return rows

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Where parameters are sharded, it is collective and gives this rank's part."""
        self._follow()
        own = self.state
        try:
            self.state = self._sharding.divide(own)  # type: ignore[assignment]
            return super().state_dict()
        finally:
            self.state = own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict()` gave; the next step is then the same, bit for bit."""
        self._follow()
        given: dict[str, Any] = {}

        def take(_: Any, found: dict[str, Any]) -> None:
            all_buffers = self.recipe.init(torch.empty(1, 1, 1, device="meta"), {**self._options, "refresh": 2})
            check_state(type(self).__name__, found, all_buffers)
            given.update(found)

        hook = self.register_load_state_dict_pre_hook(take)  # after the user's
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        # torch casts the state to the parameter's dtype and shares its memory: put back a copy of what was saved.
        saved = (index for group in given["param_groups"] for index in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        states = {p: given["state"][i] for p, i in zip(params, saved, strict=True) if i in given["state"]}
        for p, state in self._sharding.collect({p: s for p, s in states.items() if self._routes[p].layout}).items():
            self.state[p] = {name: value.to(placement.local(p).device) for name, value in state.items()}
        for p in states:
            self.state[p] = {name: value.clone() for name, value in self.state[p].items()}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: self.__dict__[name] for name in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stacks = {}
        if "_routes" in state:  # a copy, or read from a pickle: it knows no model
            self._model, self._known = None, {}
        for group in self.param_groups:
            if group["direction"] == "matrix":  # a state saved by an earlier version may lack newer options
                for key, value in self._options.items():
                    if not key.startswith("rest_"):
                        group.setdefault(key, value)


_KEPT = (
    "_routes", "_order", "_left_out", "_num_matrices", "_options", "_built", "_sharding", "_clock", "_skipped",
    "_rates", "_is_new",
)  # fmt: skip
"""What a copy takes along beside torch's own."""


def _named(routes: Sequence[Route]) -> list[tuple[str, Tensor]]:
    return [(r.name, r.parameter) for r in routes]


def _decay(params: Sequence[Tensor], bad: Tensor, rate: float) -> list[Tensor] | None:
    """What each parameter is multiplied by: 1 − rate, or one where it is skipped."""
    if not rate:
        return None
    wide = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    return list(torch.ones_like(bad, dtype=wide).masked_fill_(~bad, 1 - rate).unbind())
