"""AdamW for parameters that hold no hidden matrix: embeddings, heads, norms, biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.optim.sharding import not_finite

__all__ = ["FusedAdamW"]


class FusedAdamW:
    """torch's fused AdamW, working on the groups and the state of another optimizer."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self._defaults: dict[str, Any] = {"betas": betas, "eps": eps, "fused": True}
        self._adamw: torch.optim.AdamW | None = None

    def share(self, groups: list[dict[str, Any]], state: Any) -> None:
        """Works on these groups and this state from now on."""
        if not groups:
            return
        if self._adamw is None:
            self._adamw = torch.optim.AdamW(groups, **self._defaults)  # writes its defaults into the groups
        for group in groups:
            for key, value in self._adamw.defaults.items():
                group.setdefault(key, value)
        self._adamw.param_groups = groups
        self._adamw.state = state

    def step(self) -> tuple[list[Tensor], Tensor]:
        """Steps every parameter whose gradient is finite and has a finite square.

        A square that overflows would stay in the second moment, and the parameter would never move again.

        Returns the parameters that have a gradient, and which of them were skipped (P,).
        """
        groups = self._adamw.param_groups if self._adamw is not None else []
        params = [p for g in groups for p in g["params"] if p.grad is not None and p.grad.numel()]
        if not params:
            return [], torch.zeros(0)
        assert self._adamw is not None
        bad = not_finite([p.grad for p in params], power=2)
        held = [(p, p.grad) for p, is_bad in zip(params, bad.tolist(), strict=True) if is_bad]
        for p, _ in held:
            p.grad = None
        self._adamw.step()
        for p, grad in held:
            p.grad = grad
        return params, bad
