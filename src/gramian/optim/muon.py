"""Muon: momentum, orthogonalised."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gramian import linalg
from gramian.errors import InputError
from gramian.optim.routing import Direction, Route, route

__all__ = ["Muon"]

Scale = Literal["spectral", "match_rms_adamw"]


class Muon(torch.optim.Optimizer):
    """Steps along the polar factor of the momentum: `W ← W − lr · s · polar(g + μ B)`, with `B ← μ B + g`.

    The direction `U Vᵀ = (B Bᵀ)^(-1/2) B` has all singular values equal to one, so that weak directions of the
    gradient move as far as strong ones. Embeddings, the head, norms, biases and vectors take fused AdamW inside the
    same optimizer: one `state_dict`, one set of `param_groups`, ordinary schedulers.

    Args:
        params: the model (matrices are found by their role; best), or its `named_parameters()` or `parameters()`
            (matrices are found by their shape).
        lr: length of a step of the matrices, in the unit that `scale` sets.
        momentum, nesterov: μ, and whether the step looks ahead by one momentum update.
        weight_decay: decoupled; `W ← (1 − lr·weight_decay) W`, of the matrices.
        scale: `"spectral"`: `s = √(m/n) / L`, for L matrices in all: the share of each in the change of the network's
            function, so that one rate carries across widths and depths. `"match_rms_adamw"`: `s = 0.2 √max(m, n)`, so
            that a rate tuned for AdamW can be reused.
        rest_lr, betas, eps, rest_weight_decay: of AdamW. With `scale="spectral"`, vectors (biases, norms) take the rate
            `lr / L` where that is less, and no vector decays.
        num_iterations: Newton–Schulz steps of the polar factor (see `gm.linalg.polar`).
        routes: overrides by name pattern: `{"0.weight": "matrix", "*.pos_emb": "adamw"}`.
        layouts: as in `gm.blocks`.
        maximize: ascend.

    A parameter whose gradient is not finite (or within 1/80 of the largest float32) is skipped for that step and
    counted in `health()`; zero, rank-one and extremely scaled gradients give a finite step.

    Raises `InputError` for an empty list, a pattern that matches nothing, or a rate below zero.

    Cost: per step and matrix of m ≤ n, `num_iterations · (4 m²n + 2 m³)` operations; matrices of one shape go together.
    Source: Jordan et al., Muon (2024); scale: Large et al. (2405.14813), §3, and Liu et al. (2502.16982), §2.2.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> optimizer = Muon(net, lr=0.05)
    >>> [(row["name"], row["direction"]) for row in optimizer.explain()][:2]
    [('0.weight', 'matrix'), ('2.weight', 'adamw')]
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 0.05,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: Scale = "spectral",
        rest_lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        rest_weight_decay: float = 0.0,
        num_iterations: int = 5,
        routes: Mapping[str, Direction] | None = None,
        layouts: Mapping[str, Any] | None = None,
        maximize: bool = False,
    ) -> None:
        for label, value in (("lr", lr), ("rest_lr", rest_lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise InputError(f"Muon: {label} must not be negative, got {value}")
        if not 0 <= momentum < 1:
            raise InputError(f"Muon: momentum must be in [0, 1), got {momentum}")
        if scale not in ("spectral", "match_rms_adamw"):
            raise InputError(f"Muon: scale must be 'spectral' or 'match_rms_adamw', got {scale!r}")
        self._routes = {r.parameter: r for r in route(params, routes, layouts)}
        by_direction: dict[Direction, list[Route]] = {"matrix": [], "adamw": []}
        for r in self._routes.values():
            by_direction[r.direction].append(r)
        matrix = {
            "direction": "matrix",
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "scale": scale,
            "num_iterations": num_iterations,
            "maximize": maximize,
        }
        groups: list[dict[str, Any]] = []
        if by_direction["matrix"]:
            groups.append({"params": _named(by_direction["matrix"]), **matrix})
        tables = [r for r in by_direction["adamw"] if r.parameter.ndim >= 2]
        vectors = [r for r in by_direction["adamw"] if r.parameter.ndim < 2]
        # The vectors of all layers move at once, as their matrices do, and have to share the same change.
        share = (
            lr / _num_matrices(by_direction["matrix"]) if scale == "spectral" and by_direction["matrix"] else rest_lr
        )
        rest = [
            {"params": _named(routes), "direction": "adamw", "lr": rate, "weight_decay": decay, "maximize": maximize}
            for routes, rate, decay in ((tables, rest_lr, rest_weight_decay), (vectors, min(share, rest_lr), 0.0))
            if routes
        ]
        self._adamw = torch.optim.AdamW(rest, betas=betas, eps=eps, fused=True) if rest else None
        groups += self._adamw.param_groups if self._adamw is not None else []
        self._skipped: dict[tuple[str, ...], Tensor] = {}  # by the names of the parameters that step together
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """Lets AdamW work on this optimizer's own groups and state, so that there is one of each."""
        if self._adamw is not None:
            self._adamw.param_groups = [g for g in self.param_groups if g["direction"] == "adamw"]
            self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict()` gave; the next step is then the same, bit for bit."""
        super().load_state_dict(state_dict)
        self._share()
        # torch casts the state to the parameter's dtype: a bfloat16 parameter's float32 momentum is put back.
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        for p, index in zip((p for group in self.param_groups for p in group["params"]), saved, strict=True):
            momentum = state_dict["state"].get(index, {}).get("momentum_buffer")
            if momentum is not None:
                self.state[p]["momentum_buffer"] = momentum.to(p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_routes": self._routes, "_adamw": self._adamw, "_skipped": self._skipped}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["direction"] == "matrix":
                self._step_matrices(group)
        if self._adamw is not None:
            self._step_rest(self._adamw)
        return loss

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

    def _step_matrices(self, group: dict[str, Any]) -> None:
        batches: dict[tuple, list[Route]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None and p.grad.numel():
                r = self._routes[p]
                assert r.layout is not None
                batches[(r.layout.matrices, p.shape, p.dtype, p.device)].append(r)
        num_matrices = _num_matrices([self._routes[p] for p in group["params"]])
        for routes in batches.values():
            self._step_batch(group, routes, num_matrices)

    def _step_batch(self, group: dict[str, Any], routes: list[Route], num_matrices: int) -> None:
        """One step of parameters whose matrices have one shape, all at once."""
        params = [r.parameter for r in routes]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(
                    p, dtype=torch.promote_types(p.dtype, torch.float32)
                )
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        g = torch.stack([p.grad for p in params]).to(buffers[0].dtype)  # type: ignore[misc]
        dims = (-1, *[1] * (g.ndim - 1))
        # Also bad: a gradient so large that its sum over many steps would not be finite.
        largest = torch.finfo(g.dtype).max * (1 - group["momentum"]) / 4
        bad = ~(g.flatten(1).abs().amax(1) < largest)
        self._count_skipped(params, bad)
        # What is bad is masked on the device, without waiting for it: its buffer keeps, its step is zero.
        g = g.masked_fill_(bad.view(dims), 0.0)
        if group["maximize"]:
            g = g.neg_()
        decay = torch.where(bad, 1.0, group["momentum"]).to(g.dtype)
        momentum = torch.stack(buffers).mul_(decay.view(dims)).add_(g)
        torch._foreach_copy_(buffers, list(momentum.unbind(0)))
        direction = g.add_(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        update = self._polar(routes, direction, group["num_iterations"])
        m, n = routes[0].layout.matrices[-2:]  # type: ignore[union-attr]
        scale = math.sqrt(m / n) / num_matrices if group["scale"] == "spectral" else 0.2 * math.sqrt(max(m, n))
        length = torch.where(bad, 0.0, -group["lr"] * scale).to(update.dtype)
        if group["weight_decay"]:
            keep = torch.where(bad, 1.0, 1 - group["lr"] * group["weight_decay"]).to(params[0].dtype)
            torch._foreach_mul_(params, list(keep.unbind(0)))
        update = update.mul_(length.view(dims)).to(params[0].dtype)
        torch._foreach_add_(params, list(update.unbind(0)))

    @staticmethod
    def _polar(routes: list[Route], direction: Tensor, num_iterations: int) -> Tensor:
        """The polar factors of the matrices in `direction`, one parameter for each index of its first dimension."""
        layouts = [r.layout for r in routes if r.layout is not None]
        plain = all(layout.is_identity for layout in layouts)
        if not plain:
            direction = torch.stack([la.split(d) for la, d in zip(layouts, direction.unbind(0), strict=True)])
        update, _ = linalg.polar_ex(direction, method="newton_schulz", steps=num_iterations, certify=False)
        if not plain:
            update = torch.stack([la.join(u) for la, u in zip(layouts, update.unbind(0), strict=True)])
        return update

    def _count_skipped(self, params: list[Tensor], bad: Tensor) -> None:
        """Adds to the counts on the device, without waiting for it."""
        names = tuple(self._routes[p].name for p in params)
        self._skipped[names] = self._skipped.get(names, 0) + bad.long()

    def _step_rest(self, adamw: torch.optim.AdamW) -> None:
        """AdamW's step, without the parameters whose gradient is not finite."""
        params = [p for g in adamw.param_groups for p in g["params"] if p.grad is not None and p.grad.numel()]
        if not params:
            return
        norms = torch._foreach_norm([p.grad for p in params], ord=math.inf)
        bad = ~torch.isfinite(torch.stack(norms))
        self._count_skipped(params, bad)
        held = [(p, p.grad) for p, is_bad in zip(params, bad.tolist(), strict=True) if is_bad]
        for p, _ in held:
            p.grad = None
        adamw.step()
        for p, grad in held:
            p.grad = grad


def _num_matrices(routes: list[Route]) -> int:
    return sum(math.prod(r.layout.matrices[:-2]) for r in routes if r.layout is not None)


def _named(routes: list[Route]) -> list[tuple[str, Tensor]]:
    return [(r.name, r.parameter) for r in routes]
