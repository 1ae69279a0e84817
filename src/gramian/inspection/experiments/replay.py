"""The loss as a function of the outputs: the model's calls give what they gave before, or what is put in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import main_input, mapped, num_samples, tensors
from gramian.errors import InputError
from gramian.inspection.experiments.containers import is_container, remade
from gramian.inspection.experiments.loss_terms import Term, Terms, scalar_terms
from gramian.inspection.passes.step_records import Observed
from gramian.objective import Objective
from gramian.operators.cuts import nodes_of
from gramian.recording.hooks import hooks
from gramian.samples import first_samples, has_rows
from gramian.seeding import seed_torch

__all__ = ["Asked", "Replay", "are_equal", "loss_of", "outputs_of"]

# Samples that are enough for a property of the loss.
ENOUGH = 16
# Outputs that differ by less than this share of what differs between samples are equal up to rounding.
EQUAL = 1e-4


@dataclass
class Asked:
    """What the experiments on the first batch ask: a model in evaluation mode, and its loss of the first 16 samples.

    The model runs on these samples once, and what concerns the loss alone is asked of a replay. Where the loss is one
    of a whole batch, as with its size written in, all samples are asked.
    """

    model: nn.Module
    seen: Observed
    objective: Objective

    @property
    def batch(self) -> Any:
        """The samples."""
        return self.replay.batch

    @cached_property
    def replay(self) -> Replay:
        """The loss of these as a function of the outputs."""
        whole = self.seen.batches[0]
        try:
            return Replay(self.model, first_samples(whole, ENOUGH), self.objective)
        except Exception:
            self.model.eval()  # whatever the loss has set
            return Replay(self.model, whole, self.objective)

    @cached_property
    def is_deaf(self) -> bool:
        """Whether no output changes by a bit when all samples are given those of their neighbors."""
        return self.ignores_inputs()

    def ignores_inputs(self) -> bool:
        """The same, of the model as it is now."""
        x = main_input(self.batch)
        moved = mapped(self.batch, lambda t: t.roll(1, 0) if t.ndim and len(t) == len(x) else t)
        if len(x) < 2 or bool((x.roll(1, 0) == x).all()) or not self.replay.is_known:
            return False
        runs = [Replay(self.model, batch, self.objective).outputs for batch in (self.batch, moved)]
        return bool(runs[0]) and len(runs[0]) == len(runs[1]) and all(map(torch.equal, *runs))

    def of_part(self, rows: slice) -> Callable[[], Tensor]:
        """Computes the loss of some of the samples; tensors of other lengths stay as they are.

        It is replayed where each output and each tensor of the batch has the samples in its first dimension alone.
        """
        whole, replay = self.seen.batches[0], self.replay
        if not has_rows(whole):
            raise InputError("tensors of whole numbers have other lengths than the input: no rows are samples")
        num, here = num_samples(whole), num_samples(self.batch)
        part = mapped(whole, lambda t: t[rows] if t.ndim and len(t) == num else t)
        by_sample = all(t.ndim and len(t) == here and t.shape.count(here) == 1 for t in replay.outputs)
        if replay.is_known and replay.outputs and by_sample and all(len(t) == num for t in tensors(whole) if t.ndim):
            return lambda: replay.loss([t[rows].detach().requires_grad_() for t in replay.outputs], part)
        return lambda: _run(self.model, part, self.objective)


def loss_of(model: nn.Module, batch: Any, objective: Objective) -> float:
    """The mean loss of a batch."""
    return float(_run(model, batch, objective).detach())


def _run(model: nn.Module, batch: Any, objective: Objective) -> Tensor:
    seed_torch(0)
    with torch.enable_grad():  # a loss may differentiate on its way
        total, units = objective.loss(model, batch)
    return total / units


def outputs_of(asked: Asked, batch: Any) -> Tensor | None:
    """What the model gives for a batch, where it is called once."""
    return Replay(asked.model, batch, asked.objective).single


def are_equal(one: Tensor, two: Tensor) -> bool:
    """Whether two outputs are equal, up to rounding and beside what differs between samples."""
    between = float((one - one.mean(0)).abs().amax()) if len(one) > 1 else 0.0
    return one.shape == two.shape and between > 0 and float((one - two).abs().amax()) <= EQUAL * between


class Replay:
    """A model's outputs on a batch, and the loss with others in their place, which runs no layer.

    Only calls of the model itself are replayed; where the loss calls a part of it, that runs. Where they give objects
    that are no containers, or the loss is one of several outputs, which the model has computed, `is_known` is false. A
    TorchScript model, whose `forward` is compiled, runs again each time.

    Args:
        model: in the mode in which it is to be.
        batch: what the loss is of.
        objective: gives the loss.

    Attributes:
        outputs: the tensors of numbers that the calls gave, in their order, without a graph.
        calls: how many there were.
        parts: the terms of the loss, down to tensors.
        num_terms: how many single numbers the loss is the sum of.

    Raises: what the model raises.
    Cost: a forward pass.
    """

    def __init__(self, model: nn.Module, batch: Any, objective: Objective) -> None:
        self.model, self.batch, self.objective = model, batch, objective
        self.outputs: list[Tensor] = []
        self._made: list[Any] = []
        self._own: set[int] = set()
        self._cut: set[int] = set()
        self._is_remade = True

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._is_remade = self._is_remade and is_container(output)
            self._made.append(remade(output, self._kept) if self._is_remade else None)

        with hooks([model.register_forward_hook(keep)]), Terms() as terms:
            total = self._run(batch)
        self.parts: list[Term] = terms.read(total, model.parameters())
        self.num_terms = len(terms.leaves(total, are_scalars=True))

    @cached_property
    def is_known(self) -> bool:
        """Whether the loss is computed from the outputs, which others can replace."""
        if not self._is_remade or len(self.outputs) < 2 or all(t.ndim for t in self.outputs):
            return self._is_remade
        try:
            moving = [t.ndim for t, slope in zip(self.outputs, self.slopes, strict=True) if bool(slope.any())]
        except Exception:  # a loss that cannot be replayed or differentiated: whoever asks is told why
            return True
        return not moving or any(moving)

    @property
    def calls(self) -> int:
        return len(self._made)

    @cached_property
    def here(self) -> float:
        """The loss with the outputs as they are."""
        return self.value(self.outputs)

    @cached_property
    def slopes(self) -> list[Tensor]:
        """Its gradients by them."""
        return self.gradients(self.outputs)

    @cached_property
    def of_samples(self) -> Replay:
        """The same without the outputs that are made of parameters of one number alone, as a learned scale.

        In `loss` these stay as they are.
        """
        if not self._own:
            return self
        made = copy(self)
        made.outputs, made._own = [t for t in self.outputs if id(t) not in self._own], set()
        made.__dict__.pop("slopes", None)
        return made

    @property
    def stopped(self) -> list[int]:
        """The places of outputs without a graph beside others that have one, as those of a teacher inside the model."""
        places = [i for i, t in enumerate(self.outputs) if id(t) in self._cut]
        return places if len(places) < len(self.outputs) else []

    @property
    def is_single(self) -> bool:
        """Whether the model is called once, and gives one tensor of numbers and nothing else."""
        return self.is_known and self.calls == 1 and len(self.outputs) == 1 and self._made[0] is self.outputs[0]

    @property
    def single(self) -> Tensor | None:
        """The first output as float32, where the model is called once."""
        return self.outputs[0].float() if self.calls == 1 and self.outputs else None

    def _kept(self, t: Tensor) -> Tensor:
        held = t.detach().clone()
        if held.is_floating_point():
            self.outputs.append(held)
            if _is_own(t):
                self._own.add(id(held))
            if not t.requires_grad:
                self._cut.add(id(held))
        return held

    def _run(self, batch: Any) -> Tensor:
        """The loss of a copy of the batch, into which the loss may write."""
        return _run(self.model, mapped(batch, Tensor.clone), self.objective)

    def loss(self, outputs: Sequence[Tensor], batch: Any = None) -> Tensor:
        """The loss with these outputs; what the loss compares them with is that of another batch, where one is given.

        Args:
            outputs: in the order of `self.outputs`.
            batch: of the same form.

        Returns: a scalar.
        Raises:
            ValueError: the loss calls the model otherwise than before.
        Cost: that of the loss.
        """
        forward = _Given(self._made, {id(t) for t in self.outputs}, outputs, self.model.forward)
        batch = self.batch if batch is None else batch
        if isinstance(self.model, torch.jit.ScriptModule):  # whose `forward` is compiled
            with hooks([self.model.register_forward_hook(lambda *_: forward())]):
                return self._run(batch)
        own = vars(self.model).get("forward")
        self.model.forward = forward
        try:
            return self._run(batch)
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
        found = scalar_terms(lambda: self.loss([t.detach().requires_grad_() for t in outputs], batch))
        return [factor * value for factor, value in found]

    def value(self, outputs: Sequence[Tensor]) -> float:
        """The loss with these outputs, as a number.

        Args:
            outputs: as in `loss`.
        """
        return float(self.loss([t.detach() for t in outputs]).detach())

    def depends_on(self, i: int, values: Tensor) -> bool:
        """Whether the loss is another one with other values of an output, as of the side of a pair that is detached.

        Args:
            i: the output's place.
            values: in its stead.
        """
        return self.value([*self.outputs[:i], values, *self.outputs[i + 1 :]]) != self.here

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


class _Given:
    """In place of a model's forward: gives what its calls gave before, with others in place of the outputs."""

    def __init__(self, made: Sequence[Any], places: set[int], outputs: Sequence[Tensor], stands_for: Callable) -> None:
        self.made, self.places, self.values, self.stands_for = iter(made), places, iter(outputs), stands_for

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return remade(next(self.made), lambda t: next(self.values) if id(t) in self.places else t)
        except StopIteration:
            raise ValueError("the loss calls the model once more") from None


def _is_own(t: Tensor) -> bool:
    """Whether a number is a parameter, or made of such alone: no sample has a say in it."""
    if t.numel() != 1 or not t.requires_grad:
        return False
    leaves = [t] if t.is_leaf else [node.variable for node in nodes_of(t) if hasattr(node, "variable")]
    return all(leaf.numel() == 1 for leaf in leaves)
