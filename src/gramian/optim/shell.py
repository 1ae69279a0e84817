"""What every matrix optimizer shares: routes, batches, state, safety, and AdamW for the rest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.optim.batches import Batch, State, alike
from gramian.optim.owners import Owners, not_finite
from gramian.optim.refresh import Clock, due, stagger
from gramian.optim.rest import Rest
from gramian.optim.routing import Direction, Route, route_groups

__all__ = ["MatrixOptimizer", "Recipe", "Scale", "Shared", "Turn"]

Scale = Literal["spectral", "match_rms_adamw"]


@dataclass(frozen=True)
class Turn:
    """What a direction's update is told besides gradient and state.

    Args:
        alive: (K, 1, 1): one, or zero for a matrix whose gradient was not finite: its state is to stay as it is.
        due: indices of the matrices whose costly parts are to be made anew in this step; `None` for all.
        options: the parameter group.
    """

    alive: Tensor
    due: Tensor | None
    options: Mapping[str, Any]


class Recipe(NamedTuple):
    """A direction: two functions of stacked matrices `(K, m, n)`, which know nothing of models.

    `init(m, options)` gives the state of matrices shaped as `m`, tensors whose first dimension is K.
    `update(g, state, turn)` takes finite gradients, changes the state in place and returns the direction, of Frobenius
    norm √min(m, n) or less. It may use `g` as a buffer.
    """

    init: Callable[[Tensor, Mapping[str, Any]], State]
    update: Callable[[Tensor, State, Turn], Tensor]


class Shared(TypedDict, total=False):
    """The keyword arguments of every matrix optimizer; see `MatrixOptimizer`."""

    weight_decay: float
    scale: Scale
    rest_lr: float | None
    rest_betas: tuple[float, float]
    rest_eps: float
    rest_weight_decay: float
    refresh: int
    max_overhead: float | None
    routes: Mapping[str, Direction] | None
    layouts: Mapping[str, Any] | None
    maximize: bool


class MatrixOptimizer(torch.optim.Optimizer):
    """A step along a direction of each matrix, `W ← (1 − lr·weight_decay) W − lr · s · D`, and AdamW for the rest.

    Args:
        params: the model (matrices are found by their role; best), or its `named_parameters()`, `parameters()` or
            torch's parameter groups (matrices are found by their shape). A group's own `lr`, `weight_decay` and other
            options hold for its matrices and its rest alike.
        lr: length of a step of the matrices, in the unit that `scale` sets.
        weight_decay: decoupled, of the matrices.
        scale: `"spectral"`: `s = √(m/n) / L`, for L matrices in all: the share of each in the change of the network's
            function, so that one rate carries across widths and depths. `"match_rms_adamw"`: `s = 0.2 √max(m, n)`, so
            that a rate tuned for AdamW can be reused.
        rest_lr, rest_betas, rest_eps, rest_weight_decay: of AdamW. `rest_lr` is 3e-3 by default, or `lr` itself with
            `scale="match_rms_adamw"`. With `scale="spectral"`, vectors (biases, norms) take the rate `lr / L` where
            that is less. No vector decays.
        refresh: steps between two renewals of a direction's costly parts, staggered over the matrices.
        max_overhead: share of a step's time that the optimizer may take. `refresh` is then set once, after a few steps
            have been timed, kept in `state_dict()` and replayed.
        routes: overrides by name pattern: `{"0.weight": "matrix", "*.pos_emb": "adamw"}`.
        layouts: as in `gm.blocks`.
        maximize: ascend.

    A parameter whose gradient is not finite is skipped for that step, its state with it, and counted in `health()`;
    all ranks agree. Zero, rank-one and extremely scaled gradients give a finite step.

    The matrices of a sharded parameter (FSDP2) are worked on whole by one rank each; `state_dict()` is collective then
    and gives every rank its part, so that `torch.distributed.checkpoint` can save it and load it on other ranks.

    Raises `InputError` for an empty list, a pattern that matches nothing, or an option out of its range.
    """

    recipe: Recipe

    def __init__(
        self, params: nn.Module | Iterable[Any], lr: float, options: dict[str, Any], **shared: Unpack[Shared]
    ) -> None:
        given: dict[str, Any] = {**DEFAULTS, **shared}
        for key in shared.keys() - DEFAULTS.keys():
            wanted = ", ".join(["lr", *options, *DEFAULTS])
            raise InputError(f"{type(self).__name__}: there is no option {key!r}; there are {wanted}")
        self._routes: dict[Tensor, Route] = {}
        self._skipped: dict[tuple[str, ...], Tensor] = {}  # by the names of the parameters that step together
        self._batches: dict[int, list[Batch]] = {}  # by the number of their group
        self._owners = Owners()
        self._rest = Rest(given.pop("rest_betas"), given.pop("rest_eps"))
        self._clock = Clock(given.pop("max_overhead"))
        overrides, layouts = given.pop("routes"), given.pop("layouts")
        self._options = {"lr": lr, **options, **given}
        found = route_groups(params, overrides, layouts)
        self._routes.update((r.parameter, r) for routes, _ in found for r in routes)
        super().__init__([group for routes, own in found for group in self._split(routes, own)], {})
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, routed by their shape: a group of matrices and groups for the rest."""
        if "direction" in param_group:
            super().add_param_group(param_group)
            return
        for routes, own in route_groups([param_group], None, None):
            self._routes.update((r.parameter, r) for r in routes)
            for group in self._split(routes, own):
                super().add_param_group(group)
        self._share()

    def _split(self, routes: Sequence[Route], own: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Parameter groups for routes that share the options `own`: matrices, tables, vectors."""
        for key in own.keys() - self._options.keys() - {"initial_lr"}:
            raise InputError(f"{type(self).__name__}: a group has no option {key!r}; it has {', '.join(self._options)}")
        options = self._options | dict(own)
        if "weight_decay" in own:
            options["rest_weight_decay"] = own["weight_decay"]
        check(type(self).__name__, options)
        lr, rest_lr, rest_decay = options["lr"], options.pop("rest_lr"), options.pop("rest_weight_decay")
        matrices = [r for r in routes if r.direction == "matrix"]
        tables = [r for r in routes if r.direction == "adamw" and r.parameter.ndim >= 2]
        vectors = [r for r in routes if r.direction == "adamw" and r.parameter.ndim < 2]
        if rest_lr is None:
            rest_lr = lr if options["scale"] == "match_rms_adamw" else REST_LR
        # The vectors of all layers move at once, as their matrices do, and have to share the same change.
        shares = options["scale"] == "spectral" and self._num_matrices
        vector_lr = min(rest_lr, lr / self._num_matrices) if shares else rest_lr
        groups: list[dict[str, Any]] = []
        if matrices:
            groups.append({"params": _named(matrices), "direction": "matrix", **options, "step": 0})
        for rest, rate, decay in ((tables, rest_lr, rest_decay), (vectors, vector_lr, 0.0)):
            if rest:
                own_rest = {"lr": rate, "weight_decay": decay, "maximize": options["maximize"]}
                groups.append({"params": _named(rest), "direction": "adamw", **own_rest})
        return groups

    @property
    def _num_matrices(self) -> int:
        return sum(math.prod(r.layout.matrices[:-2]) for r in self._routes.values() if r.layout is not None)

    def _share(self) -> None:
        """Lets AdamW work on this optimizer's own groups and state, so that there is one of each."""
        self._rest.share([g for g in self.param_groups if g["direction"] == "adamw"], self.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [g for g in self.param_groups if g["direction"] == "matrix"]
        with self._clock.timed(groups):
            for number, group in enumerate(groups):
                self._step_matrices(number, group)
            self._count_skipped(*self._rest.step())
        return loss

    def _step_matrices(self, number: int, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None and p.grad.numel()]
        if params:
            bad = not_finite([p.grad for p in params])  # type: ignore[misc]
            self._count_skipped(params, bad)
            flags = dict(zip(params, bad.unbind(), strict=True))
            grads, updates = self._owners.gather(params), {}
            for batch in self._current(number, group, list(grads)):
                updates.update(self._step_batch(batch, group, grads, flags))
            keep = torch.where(bad, 1.0, 1 - group["lr"] * group["weight_decay"]) if group["weight_decay"] else None
            self._owners.add_(params, updates, keep)
        group["step"] += 1

    def _current(self, number: int, group: dict[str, Any], params: list[Tensor]) -> list[Batch]:
        """The batches of these parameters, with the state as it is now."""
        buckets = alike([self._routes[p] for p in params])
        batches = self._batches.get(number, [])
        if len(batches) != len(buckets) or not all(
            b.holds(routes, self.state) for b, routes in zip(batches, buckets, strict=True)
        ):
            batches = [Batch(routes, lambda m: self.recipe.init(m, group), self.state) for routes in buckets]
            for batch in batches:
                self.state.update((r.parameter, views) for r, views in zip(batch.routes, batch.views, strict=True))
            self._batches[number] = batches
        if any(batch.stagger != group["refresh"] for batch in batches):
            stagger(batches, group["refresh"])
        return batches

    def _step_batch(
        self, batch: Batch, group: dict[str, Any], grads: Mapping[Tensor, Tensor], flags: Mapping[Tensor, Tensor]
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """What is to be added to each parameter of the batch."""
        params = [r.parameter for r in batch.routes]
        g = batch.stack([grads[p] for p in params])
        bad = batch.repeat(torch.stack([flags[p] for p in params]).to(g.device))
        # What is bad is masked on the device, without waiting for it; on the CPU there is nothing to wait for.
        if g.device.type != "cpu" or bool(bad.any()):
            g.masked_fill_(bad, 0.0)
        if group["maximize"]:
            g.neg_()
        turn = Turn((~bad).to(g.dtype), due(batch, group), group)
        direction = self.recipe.update(g, batch.state, turn)
        batch.fresh = False
        m, n = batch.shape[-2:]
        scale = math.sqrt(m / n) / self._num_matrices if group["scale"] == "spectral" else 0.2 * math.sqrt(max(m, n))
        update = direction * (turn.alive * (-group["lr"] * scale)).to(direction.dtype)
        return zip(params, batch.unstack(update), strict=True)

    def _count_skipped(self, params: Sequence[Tensor], bad: Tensor) -> None:
        """Adds to the counts on the device, without waiting for it."""
        names = tuple(self._routes[p].name for p in params)
        if names:
            self._skipped[names] = self._skipped.get(names, 0) + bad.long()

    def explain(self) -> list[dict[str, str]]:
        """Each parameter's name, direction, matrices and the reason for its route."""
        return [
            {
                "name": r.name,
                "direction": r.direction,
                "matrices": "" if r.layout is None else " × ".join(map(str, r.layout.matrices)),
                "reason": r.reason,
            }
            for r in self._routes.values()
        ]

    def health(self) -> dict[str, int]:
        """How many steps each parameter skipped because its gradient was not finite, where any were."""
        counts: dict[str, int] = defaultdict(int)
        for names, skipped in self._skipped.items():
            for name, count in zip(names, skipped.tolist(), strict=True):
                counts[name] += count
        return {name: count for name, count in counts.items() if count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict()` gave; the next step is then the same, bit for bit."""
        super().load_state_dict(state_dict)
        self._share()
        # torch casts the state to the parameter's dtype: a bfloat16 parameter's float32 state is put back.
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        for p, index in zip((p for group in self.param_groups for p in group["params"]), saved, strict=True):
            if p in self._routes and self._routes[p].direction == "matrix" and p in self.state:
                kept = state_dict["state"][index]
                self.state[p] = {name: value.to(p.device, copy=True) for name, value in kept.items()}

    def __getstate__(self) -> dict[str, Any]:
        own = ("_routes", "_rest", "_skipped", "_options", "_owners", "_clock")
        return super().__getstate__() | {name: self.__dict__[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._batches = {}
        self._share()


REST_LR = 3e-3

DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "scale": "spectral",
    "rest_lr": None,
    "rest_betas": (0.9, 0.95),
    "rest_eps": 1e-8,
    "rest_weight_decay": 0.0,
    "refresh": 1,
    "max_overhead": None,
    "routes": None,
    "layouts": None,
    "maximize": False,
}


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raises for an option out of its range."""
    for key, value in options.items():
        if (key.endswith("lr") or key.endswith("weight_decay")) and value is not None and not value >= 0:
            raise InputError(f"{name}: {key} must not be negative, got {value}")
        if key.startswith("beta") or key.endswith("momentum"):
            if not 0 <= value < 1:
                raise InputError(f"{name}: {key} must be in [0, 1), got {value}")
    if options["scale"] not in ("spectral", "match_rms_adamw"):
        raise InputError(f"{name}: scale must be 'spectral' or 'match_rms_adamw', got {options['scale']!r}")
    if not (isinstance(options["refresh"], int) and options["refresh"] >= 1):
        raise InputError(f"{name}: refresh must be a whole number of steps, at least 1, got {options['refresh']!r}")


def _named(routes: Sequence[Route]) -> list[tuple[str, Tensor]]:
    return [(r.name, r.parameter) for r in routes]
