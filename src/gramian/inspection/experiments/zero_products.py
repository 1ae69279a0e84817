"""Values that are multiplied by exactly zero, by experiment: with ones in their place, a gradient arrives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.batch import num_samples
from gramian.inspection.passes.current_module import Follower
from gramian.inspection.passes.gate_functions import PRODUCTS
from gramian.inspection.passes.nonfinite_derivatives import gradients_of
from gramian.inspection.passes.step_records import Observed
from gramian.objective import Objective
from gramian.recording.measuring import training
from gramian.recording.taps import in_vmap
from gramian.samples import first_samples
from gramian.seeding import seed_torch

__all__ = ["Zeroed", "find_zeroed"]

# Functions of which the first two arguments are multiplied.
_MATRIX_PRODUCTS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm,
    torch.bmm, Tensor.bmm,
}  # fmt: skip
# Passes in which a gradient must stay zero, over all batches.
DRAWS = 8
_PRODUCTS = PRODUCTS | _MATRIX_PRODUCTS


@dataclass(frozen=True)
class _Product:
    """A product with zeros: where it is, and what is zero."""

    place: str
    shape: tuple[int, ...] | None  # of the zeros; `None` for a number
    name: str  # of the parameter or buffer that they are
    is_parameter: bool
    number: float | None  # the other factor, where it is one number


@dataclass(frozen=True)
class Zeroed:
    """Products with zeros that keep the gradient from parameters.

    Attributes:
        place: the module of the first product; "loss" outside of all.
        shape: of its zeros; `None` for a number.
        name: the parameter or buffer that they are, or empty.
        is_parameter: whether it is a parameter.
        starved: the parameters to which no gradient comes, and would if ones stood there.
        num_trained: of how many.
    """

    place: str
    shape: tuple[int, ...] | None
    name: str
    is_parameter: bool
    starved: tuple[str, ...]
    num_trained: int


class _Products(Follower):
    """Counts products; finds those with zeros, or puts ones in the place of the zeros of some."""

    def __init__(self, model: nn.Module, opened: Collection[int] = ()) -> None:
        super().__init__(model)
        self.opened, self.count = opened, 0
        self.found: dict[int, _Product] = {}
        self.depth = 0
        self.names = {id(t): (n, True) for n, t in model.named_parameters()}
        self.names |= {id(t): (n, False) for n, t in model.named_buffers()}

    def entered(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.depth += 1

    def returned(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.depth -= 1

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and len(args) > 1 and not in_vmap():
            with torch._C.DisableTorchFunction():
                at = _zeros_of(args)
                if at is not None:
                    zeros = args[at]
                    if self.count in self.opened:
                        ones = torch.ones_like(zeros) if isinstance(zeros, Tensor) else 1.0
                        args = (*args[:at], ones, *args[at + 1 :])
                    else:
                        shape = tuple(zeros.shape) if isinstance(zeros, Tensor) and zeros.ndim else None
                        place = (self.place or "all layers") if self.depth else "loss"
                        found = self.names.get(id(zeros)) or self.names.get(
                            id(getattr(zeros, "_base", None)), ("", False)
                        )
                        other = args[1 - at].detach()
                        number = float(other) if other.ndim == 0 else None
                        self.found[self.count] = _Product(place, shape, *found, number)
            self.count += 1
        return func(*args, **kwargs)


def _zeros_of(args: Sequence[Any]) -> int | None:
    """Which of two factors is zero and has no gradient, where the other has one."""
    for at, other in ((0, args[1]), (1, args[0])):
        zeros = args[at]
        if not (isinstance(other, Tensor) and other.requires_grad):
            continue
        if isinstance(zeros, Tensor):
            if not zeros.requires_grad and zeros.numel() and not bool(zeros.any()):
                return at
        elif isinstance(zeros, (int, float)) and zeros == 0:
            return at
    return None


def find_zeroed(
    model: nn.Module, observed: Observed, objective: Objective, waiting: Collection[str] = ()
) -> Zeroed | None:
    """Find out whether gradients are exactly zero because a value is multiplied by zeros that nothing trains.

    The loss is computed again with ones in the place of the zeros: a gradient that arrives then, and is zero in all
    batches as they are, was kept out by them. What does not depend on the data is `0 * parameter.sum()`, added so that
    a parameter has a gradient: the number that is multiplied by zero is the same for two batches, or the gradient is.

    Args:
        model: in its own mode; left as it was.
        observed: of this model; has its batches.
        objective: gives the loss.
        waiting: parameters whose zero gradients do not last, for another reason.

    Returns: a `Zeroed`, or `None`.
    Raises: what the model raises.
    Cost: nothing where no gradient is exactly zero; else a forward pass, and some 12 passes forward and backward where
        a product with zeros is found.
    """
    trained = {n: p for n, p in model.named_parameters() if observed.gradients.get(n) is not None}
    still = {n: p for n, p in trained.items() if observed.gradients[n] == 0.0 and n not in waiting}
    if not still:
        return None
    first, *others = observed.batches
    second = others[0] if others else first_samples(first, max(1, num_samples(first) // 2))
    with training(model):
        found = _run(model, first, objective)[1].found
        if any(product.number is not None for product in found.values()):
            again = _run(model, second, objective)[1].found
            found = {
                i: p for i, p in found.items() if p.number is None or i not in again or again[i].number != p.number
            }
        if not found:
            return None
        one, two = (_gradients(model, batch, objective, still, found) for batch in (first, second))
        starved = {n: p for n, p in still.items() if bool(one[n].any()) and not torch.equal(one[n], two[n])}
        for i in range(DRAWS):  # what is drawn, as the layers that stochastic depth leaves out, is drawn anew
            if starved:
                batch = observed.batches[(i + 1) % len(observed.batches)]
                gradients = _gradients(model, batch, objective, starved, seed=i + 1)
                starved = {n: p for n, p in starved.items() if not bool(gradients[n].any())}
        if not starved:
            return None
        for i, product in found.items():  # the first that alone lets a gradient through, if one does
            gradients = _gradients(model, first, objective, starved, (i,))
            opened = tuple(n for n in starved if bool(gradients[n].any()))
            if opened:
                return Zeroed(*_fields(product), opened, len(trained))
    product = next(iter(found.values()))
    return Zeroed(*_fields(product), tuple(starved), len(trained))


def _fields(product: _Product) -> tuple[str, tuple[int, ...] | None, str, bool]:
    return product.place, product.shape, product.name, product.is_parameter


def _run(
    model: nn.Module, batch: Any, objective: Objective, opened: Collection[int] = (), seed: int = 0
) -> tuple[Tensor, _Products]:
    seed_torch(seed)
    with _Products(model, opened).installed() as products, torch.enable_grad():
        total, units = objective.loss(model, batch)
    return total / units, products


def _gradients(
    model: nn.Module,
    batch: Any,
    objective: Objective,
    wanted: Mapping[str, Tensor],
    opened: Collection[int] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """The gradients with ones in the place of some zeros; zero where none arrives or the loss cannot be computed so."""
    nothing = {n: torch.zeros_like(p) for n, p in wanted.items()}
    with suppress(RuntimeError):
        found = gradients_of(_run(model, batch, objective, opened, seed)[0], list(wanted.values()))
        dense = [g if g is None or not g.is_sparse else g.to_dense() for g in found]
        return {n: nothing[n] if g is None else g for n, g in zip(wanted, dense, strict=True)}
    return nothing
