"""The optimizers that race: peers, and every matrix optimizer of `gm.optim`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gramian.block import blocks
from gramian.errors import InputError
from gramian.optim.registry import AUTO, MATRIX_OPTIMIZERS, OPTIMIZERS, Entry

__all__ = [
    "ADAMW",
    "COMPETITORS",
    "DEFAULT",
    "TORCH_MUON",
    "Competitor",
    "Stepper",
    "chosen",
    "hidden_and_rest",
    "ours",
]

CHOICE_VARIABLE = "GRAMIAN_BENCH_COMPETITORS"


class Stepper(Protocol):
    """What a race needs of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def zero_grad(self) -> None: ...

    def step(self) -> Any: ...


@dataclass(frozen=True)
class Competitor:
    """One optimizer.

    Args:
        make: `make(model, lr, rest_lr)`; `rest_lr` is AdamW's tuned rate on the same task, for parameters that are no
            hidden matrix. Gramian's own do not use it: they get the model and `lr`, and nothing else.
        start: where on the grid tuning starts, at the nearest rate: the one that its documentation shows.
        package: what it needs besides torch.
        ours: whether it is gramian's.
        remark: how it was configured.
    """

    make: Callable[[nn.Module, float, float], Stepper]
    start: float
    package: str = ""
    ours: bool = False
    remark: str = ""

    def obstacle(self) -> str:
        """Why it cannot take part; empty where it can."""
        if self.package and find_spec(self.package) is None:
            return f"not measured: {self.package} is not installed"
        return ""


class _Together:
    """Two optimizers that step as one: hidden matrices by the first, the rest by fused AdamW."""

    def __init__(self, parts: Sequence[Stepper]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def hidden_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The hidden matrices of `gm.blocks`, and all other parameters."""
    found, _ = blocks(model)
    names = {b.name for b in found if b.role == "hidden"}
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        parts[name not in names].append(parameter)
    return parts


class _AsMatrices:
    """An optimizer of matrices alone, given kernels and stacks of experts as views of two dimensions of their memory.

    A kernel `(out, in, taps…)` has a row for each output; a stack is taken apart.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.params = params
        self.kernels = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
        self.views = [[nn.Parameter(view) for view in self._matrices(p, p.detach())] for p in params]
        self.optimizer = make([view for views in self.views for view in views])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def step(self) -> None:
        for p, views in zip(self.params, self.views, strict=True):
            if p.grad is not None:
                for view, grad in zip(views, self._matrices(p, p.grad), strict=True):
                    view.grad = grad
        self.optimizer.step()

    def _matrices(self, p: nn.Parameter, x: Tensor) -> Sequence[Tensor]:
        return [x.flatten(1)] if id(p) in self.kernels else x.flatten(0, -3).unbind() if x.ndim > 2 else [x]


def _adamw(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True)


def _torch_muon(model: nn.Module, lr: float, rest_lr: float) -> Stepper:
    hidden, rest = hidden_and_rest(model)
    muon = _AsMatrices(model, hidden, lambda matrices: torch.optim.Muon(matrices, lr=lr, weight_decay=0.0))
    return _Together([muon, _adamw(rest, rest_lr)])


def _peer_muon(model: nn.Module, lr: float, rest_lr: float) -> Stepper:
    import pytorch_optimizer  # pyright: ignore[reportMissingImports]  the bench extra

    hidden, rest = hidden_and_rest(model)
    muon = pytorch_optimizer.Muon([{"params": hidden, "lr": lr, "use_muon": True}])
    return _Together([muon, _adamw(rest, rest_lr)])


def _peer_soap(model: nn.Module, lr: float, rest_lr: float) -> Stepper:
    import pytorch_optimizer  # pyright: ignore[reportMissingImports]  the bench extra

    hidden, rest = hidden_and_rest(model)
    return _Together([pytorch_optimizer.SOAP(hidden, lr=lr, weight_decay=0.0), _adamw(rest, rest_lr)])


def _heavyball(name: str) -> Callable[[nn.Module, float, float], Stepper]:
    """One of HeavyBall's, for hidden matrices; it compiles its step, and folds kernels, itself."""

    def make(model: nn.Module, lr: float, rest_lr: float) -> Stepper:
        import heavyball  # pyright: ignore[reportMissingImports]  the bench extra

        heavyball.utils.compile_mode = "default"  # its own, which tries every kernel, takes minutes for a network
        hidden, rest = hidden_and_rest(model)
        return _Together([getattr(heavyball, name)(hidden, lr=lr, weight_decay=0.0), _adamw(rest, rest_lr)])

    return make


def _entry(entry: Entry) -> Competitor:
    """One of `gm.optim` with its defaults: it gets the model and a rate."""
    return Competitor(lambda model, lr, rest_lr: entry.make(model, lr), entry.lr, ours=True)


def ours(name: str) -> str:
    """The name in the race of an optimizer of the registry.

    >>> ours("soap")
    'gramian SOAP'
    """
    return f"gramian {OPTIMIZERS[name].optimizer.__name__}"


ADAMW = "AdamW, fused"
TORCH_MUON = "torch Muon"
DEFAULT = ours(AUTO)
"""The one that has to win on every task."""

_REST = "the rest by fused AdamW at its tuned rate"
COMPETITORS: dict[str, Competitor] = {
    ADAMW: Competitor(lambda model, lr, rest_lr: _adamw(model.parameters(), lr), 1e-3),
    TORCH_MUON: Competitor(_torch_muon, 3.16e-2, remark=f"hidden matrices, kernels flattened; {_REST}"),
    "pytorch_optimizer Muon": Competitor(_peer_muon, 3.16e-2, "pytorch_optimizer", remark=f"hidden matrices; {_REST}"),
    "pytorch_optimizer SOAP": Competitor(_peer_soap, 3.16e-3, "pytorch_optimizer", remark=f"hidden matrices; {_REST}"),
    "HeavyBall Muon": Competitor(_heavyball("Muon"), 3.16e-3, "heavyball", remark=f"hidden matrices; {_REST}"),
    "HeavyBall SOAP": Competitor(_heavyball("SOAP"), 3.16e-3, "heavyball", remark=f"hidden matrices; {_REST}"),
    **{ours(name): _entry(entry) for name, entry in MATRIX_OPTIMIZERS.items()},
}
"""Weight decay is zero for all; momentum and all other options are each one's defaults."""


def chosen() -> dict[str, Competitor]:
    """The competitors whose name contains one of the words, separated by commas, of GRAMIAN_BENCH_COMPETITORS.

    All of them where it is not set. Fused AdamW always takes part, since the others use its tuned rate.

    >>> list(chosen())[0]
    'AdamW, fused'
    """
    words = [word.strip() for word in os.environ.get(CHOICE_VARIABLE, "").split(",") if word.strip()]
    for word in words:
        if not any(word in name for name in COMPETITORS):
            raise InputError(f"{CHOICE_VARIABLE}: no optimizer's name contains {word!r}; {', '.join(COMPETITORS)}")
    return {k: c for k, c in COMPETITORS.items() if k == ADAMW or not words or any(word in k for word in words)}
