"""The loss as a function of the outputs: the model's calls give what they gave before, or what is put in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import mapped
from gramian.inspection.experiments.terms import contributions
from gramian.objective import Objective
from gramian.recording.keeping import seed_torch

__all__ = ["Replay"]

_KNOWN = (Tensor, tuple, list, dict)


class Replay:
    """A model's outputs on a batch, and the loss with others in their place, which runs no layer.

    Only calls of the model itself are replayed; where the loss calls a part of it, that runs. Those of a TorchScript
    model cannot be, whose `forward` is compiled: `is_known` is false.

    Args:
        model: in the mode in which it is to be.
        batch: what the loss is of.
        objective: gives the loss.

    Attributes:
        outputs: the tensors of numbers that the calls gave, in their order, without a graph.
        calls: how many there were.

    Raises: what the model raises.
    Cost: a forward pass.
    Source: this library's own.
    """

    def __init__(self, model: nn.Module, batch: Any, objective: Objective) -> None:
        self.model, self.batch, self.objective = model, batch, objective
        self.outputs: list[Tensor] = []
        self._made: list[Any] = []
        self.is_known = not isinstance(model, torch.jit.ScriptModule)

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.is_known = self.is_known and type(output) in _KNOWN
            self._made.append(mapped(output, self._kept) if self.is_known else None)

        handle = model.register_forward_hook(keep)
        try:
            self._run(batch)
        finally:
            handle.remove()

    @property
    def calls(self) -> int:
        return len(self._made)

    def _kept(self, t: Tensor) -> Tensor:
        held = t.detach().clone()
        if held.is_floating_point():
            self.outputs.append(held)
        return held

    def _run(self, batch: Any) -> Tensor:
        seed_torch(0)
        with torch.enable_grad():  # a loss may differentiate on its way
            total, units = self.objective.loss(self.model, batch)
        return total / units

    def loss(self, outputs: Sequence[Tensor], batch: Any = None) -> Tensor:
        """The loss with these outputs; what the loss compares them with is that of another batch, where one is given.

        Args:
            outputs: in the order of `self.outputs`.
            batch: of the same form.

        Returns: a scalar.
        Raises:
            ValueError: the loss calls the model otherwise than before.
        Cost: that of the loss.
        Source: this library's own.
        """
        made = iter(self._made)
        values = iter(outputs)
        places = {id(t) for t in self.outputs}

        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                return mapped(next(made), lambda t: next(values) if id(t) in places else t)
            except StopIteration:
                raise ValueError("the loss calls the model once more") from None

        own = vars(self.model).get("forward")
        self.model.forward = forward
        try:
            return self._run(self.batch if batch is None else batch)
        finally:
            if own is None:
                del self.model.forward
            else:
                self.model.forward = own

    def terms(self, outputs: Sequence[Tensor], batch: Any = None) -> list[float]:
        """What each term adds to the loss with these outputs.

        Args:
            outputs, batch: as in `loss`.
        """
        return contributions(lambda: self.loss([t.detach().requires_grad_() for t in outputs], batch))

    def value(self, outputs: Sequence[Tensor]) -> float:
        """The loss with these outputs, as a number.

        Args:
            outputs: as in `loss`.
        """
        return float(self.loss([t.detach() for t in outputs]).detach())

    def gradients(self, outputs: Sequence[Tensor], batch: Any = None, *, scale: float = 1.0) -> list[Tensor]:
        """The loss's gradients by these outputs, zero where it does not depend on one.

        Args:
            outputs, batch: as in `loss`.
            scale: of the loss, before it is differentiated: half precision makes small gradients zero.
        """
        free = [t.detach().clone().requires_grad_() for t in outputs]
        total = self.loss(free, batch)
        if not total.requires_grad:
            return [torch.zeros_like(t) for t in free]
        found = torch.autograd.grad(total * scale, free, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(free, found, strict=True)]
