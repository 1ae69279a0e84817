"""Gains, the end-to-end Jacobian, and the curvature along a line, measured without changing the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gramian.block import blocks
from gramian.errors import InputError, UnsupportedError
from gramian.layers import operation_of, runs_as_its_class
from gramian.objective import Objective, as_objective
from gramian.recording import measuring
from gramian.recording.taps import in_vmap

__all__ = ["Gain", "LineCurvature", "end_to_end_jacobian", "layer_gains", "line_curvature"]

# Where both sides of the end-to-end Jacobian are wider than this, its spectrum is not measured.
MAX_JACOBIAN_SIDE = 512


@dataclass(frozen=True)
class Gain:
    """The gain χ of one layer: the mean squared singular value of the Jacobian to the next layer.

    Args:
        chi: χ; 1 keeps the size of a gradient.
        standard_error: of χ, over samples and probes.
    """

    chi: float
    standard_error: float


def layer_gains(
    model: nn.Module,
    batch: Any,
    objective: Objective | Callable,
    *,
    num_probes: int = 4,
    generator: torch.Generator | None = None,
) -> dict[str, Gain | None]:
    """The gain χ of each layer: the mean squared singular value of the Jacobian from its input to the next's input.

    `χ = E‖Jᵀv‖² / min(m, n)` over standard normal `v` and the samples of the batch; critical at 1. The graph is cut at
    every layer's input, so that one backward pass measures all layers and nothing vanishes on the way.

    Args:
        model: any module; it is left as it was.
        batch: one batch, as `objective` takes it.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean`.
        num_probes: random vectors v for each sample.
        generator: draws them; seeded with 0 by default.

    Returns:
        Gains by block name in forward order. `None` where the next layer's input does not depend on this layer alone
        (skip connections, attention, recurrence): there the gradient's size by depth says what the product does.
        The last layer's gain is to its own output.

    Raises: nothing of its own.
    Cost: one forward and `num_probes` backward passes. Accuracy: the standard error, over samples and probes.
    Source: χ of Schoenholz et al. (1611.01232), eq. 5; the estimator is Hutchinson's.

    >>> net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    >>> for layer in net:
    ...     _ = layer.weight.data.copy_(2 * torch.eye(4))
    >>> gains = layer_gains(net, (torch.ones(8, 4), torch.zeros(8, 4)), Objective.regression(), num_probes=64)
    >>> 3.5 < gains["0.weight"].chi < 4.5
    True
    """
    objective = as_objective(objective)
    device = next(model.parameters()).device
    generator = generator or torch.Generator(device).manual_seed(0)
    with measuring(model), torch.enable_grad():
        with _cut(model) as cuts:
            objective.predict(model, batch)
        uses = cuts.uses
        ends = [*(use.arriving for use in uses[1:]), cuts.output]
        names = [use.name for use in uses]
        gains: dict[str, Gain | None] = {}
        pairs: list[tuple[str, Tensor, Tensor]] = []
        leaves = {id(use.leaving) for use in uses}
        for use, end in zip(uses, ends, strict=False):
            gains[use.name] = None
            chain = operation_of(use.module).gain and names.count(use.name) == 1
            if chain and end is not None and leaves_of(end) & leaves == {id(use.leaving)}:
                pairs.append((use.name, use.leaving, end))
        for name, start, end in pairs:  # one at a time: the vectors of all would be as large as all activations
            side = min(start.numel(), end.numel()) / len(start)  # of one sample's Jacobian
            values = []
            for probe in range(num_probes):
                v = torch.empty_like(end).normal_(generator=generator)
                keep = probe + 1 < num_probes
                (grad,) = torch.autograd.grad(end, start, v, retain_graph=keep, allow_unused=True)
                if grad is not None:
                    sizes = torch.linalg.vector_norm(grad.reshape(len(grad), -1), dim=1, dtype=torch.float64)
                    values.append(sizes.square() / side)
            if not values:
                continue
            chi = torch.cat(values)
            error = chi.std() / len(chi) ** 0.5 if len(chi) > 1 else torch.tensor(float("nan"))
            gains[name] = Gain(float(chi.mean()), float(error))
    return gains


def end_to_end_jacobian(model: nn.Module, batch: Any, objective: Objective | Callable) -> Tensor | None:
    """The Jacobian of each sample from the first layer's input to the last layer's input.

    Where the input holds indices (an embedding), the first layer's output takes its place.

    Args:
        model: any module; it is left as it was.
        batch: one batch, as `objective` takes it.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean`.

    Returns:
        `(samples, m, n)`; `None` where m exceeds 512 or n 32,768, where the rows of both are not samples (a graph's
        nodes mix), where the last layer does not depend on the first or the first is called twice (two towers, a pair
        of inputs), or where there are fewer than two layers.

    Raises: nothing of its own.
    Cost: one forward pass, and m + 1 backward passes of the batch. Accuracy: exact to rounding.
    Source: the definition.

    >>> net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1))
    >>> j = end_to_end_jacobian(net, (torch.ones(1, 3), torch.zeros(1, 1)), Objective.regression())
    >>> torch.equal(j[0], net[0].weight)
    True
    """
    found = try_jacobian(model, batch, objective)
    return found if isinstance(found, Tensor) else None


@dataclass(frozen=True)
class NoJacobian:
    """Why there is no end-to-end Jacobian; `is_chain` is false where no path leads from the first to the last layer."""

    reason: str
    is_chain: bool = True


def try_jacobian(
    model: nn.Module, batch: Any, objective: Objective | Callable, *, copies: int = 1, most: int = MAX_JACOBIAN_SIDE
) -> Tensor | NoJacobian:
    """The Jacobian as `end_to_end_jacobian` gives it, or the reason why there is none.

    Args:
        model, batch, objective: as there.
        copies: each sample stands in the batch this many times, one after the other, so that a backward pass gives as
            many rows of its Jacobian.
        most: rows from which on it counts as too large.
    """
    objective = as_objective(objective)
    with measuring(model), _cut(model, only_first=True) as cuts, torch.enable_grad():
        objective.predict(model, batch)
        uses = cuts.uses
        if len(uses) < 2:
            return NoJacobian("fewer than two layers were called with a tensor")
        first, last = uses[0], uses[-1]
        start, end = first.leaving, last.arriving
        if end is start or not end.requires_grad or id(start) not in leaves_of(end):
            if any(use.name in (first.name, last.name) for use in uses[1:-1]):
                return NoJacobian("the layers are used several times in a forward pass, and not in one chain")
            return NoJacobian(f"the input of {last.name} does not depend on that of {first.name}", is_chain=False)
        if start.shape[0] != end.shape[0]:
            rows = f"{first.name} has {start.shape[0]} rows and {last.name} has {end.shape[0]}"
            return NoJacobian(f"{rows}, so rows are not samples")
        m, n = end[0].numel(), start[0].numel()
        if m > most or n > 64 * MAX_JACOBIAN_SIDE:
            return NoJacobian(f"it is too large, {m} × {n} for each sample")
        if _mixes(start, end):
            return NoJacobian(f"a row at {last.name} depends on several rows at {first.name}: rows are not samples")
        jacobian, copy = [], torch.arange(len(end), device=end.device) % copies
        for k in range(0, m, copies):
            v = torch.zeros(len(end), m + copies, dtype=end.dtype, device=end.device)
            v.scatter_(1, (k + copy)[:, None], 1.0)
            (rows,) = torch.autograd.grad(end, start, v[:, :m].reshape(end.shape), retain_graph=k + copies < m)
            jacobian.append(rows.reshape(-1, copies, n))
        return torch.cat(jacobian, dim=1)[:, :m]


def _mixes(start: Tensor, end: Tensor) -> bool:
    """Whether a row of `end` depends on another row of `start`.

    Some rows must give no gradient at the others. What mixes rows mixes all, or each with those before it, or at some
    distance: those whose number has an odd number of binary ones (the sequence of Thue and Morse) repeat at none.
    """
    if len(start) < 2:
        return False
    ones = torch.tensor([n.bit_count() % 2 == 1 for n in range(len(start))], device=end.device)
    v = torch.empty_like(end).normal_(generator=torch.Generator(end.device).manual_seed(0))
    v[~ones] = 0
    (grad,) = torch.autograd.grad(end, start, v, retain_graph=True)
    return bool((grad[~ones].nan_to_num(0.0, 0.0, 0.0) != 0).any())


@dataclass(frozen=True)
class LineCurvature:
    """The mean loss of a batch along θ − ηD, to second order: `loss − η · slope + ½ η² · curvature`.

    Args:
        loss: at η = 0.
        slope: gᵀD.
        curvature: DᵀHD.
        matrix: which H.
    """

    loss: float
    slope: float
    curvature: float
    matrix: Literal["gauss_newton", "hessian"]

    @property
    def minimum(self) -> float:
        """η* = slope / curvature, where the parabola is lowest; infinite where it has no lowest point ahead."""
        if not self.slope > 0:
            return 0.0
        return self.slope / self.curvature if self.curvature > 0 else math.inf


def line_curvature(
    model: nn.Module,
    batch: Any,
    objective: Objective | Callable,
    direction: Mapping[Tensor, Tensor],
    *,
    matrix: Literal["gauss_newton", "hessian"] | None = None,
) -> LineCurvature:
    """Slope and curvature of the mean loss along a direction D of the parameters: `gᵀD` and `DᵀHD`.

    Args:
        model: in the mode in which it is to be measured. Buffers that a forward pass changes are not restored.
        batch: one batch, as `objective` takes it.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean`.
        direction: parameter → its part of D. Parameters that are not in it do not move.
        matrix: H. `"gauss_newton"`, JᵀLJ with L the Hessian of the criterion, is never negative for a convex criterion,
            and the default where the objective's output is a tensor; `"hessian"` is that of a plain loss function.

    Returns:
        `LineCurvature`, with `minimum`.

    Raises:
        UnsupportedError: an operation of the model has no second derivative.
        InputError: the direction is empty, or the objective has no Gauss–Newton matrix.

    Cost: a forward pass and about five backward passes. Accuracy: exact to rounding. Attention runs in its unfused
    form, which alone has second derivatives.
    Source: Pearlmutter, Neural Computation 6 (1994); Schraudolph, Neural Computation 14 (2002), §3.

    >>> net, batch = nn.Linear(3, 1, bias=False), (torch.eye(3), torch.zeros(3, 1))
    >>> line_curvature(net, batch, Objective.regression(), {net.weight: torch.ones(1, 3)}).curvature
    1.0
    """
    split = isinstance(objective, Objective)
    objective = as_objective(objective)
    params = [p for p in direction if p.requires_grad]
    parts = [direction[p].detach().to(p.dtype) for p in params]
    if not params:
        raise InputError("line_curvature: the direction holds no trainable parameter; give at least one")
    with twice_differentiable():
        output = objective.predict(model, batch)
        total, units = objective.checked(objective.criterion(output, batch))
        whole = isinstance(output, Tensor) and output.is_floating_point() and split
        if matrix == "gauss_newton" and not whole:
            raise InputError(
                "line_curvature: a Gauss–Newton matrix wants a gm.Objective whose predict() returns a tensor; "
                "got a plain loss, or another output. Use matrix='hessian'"
            )
        matrix = matrix or ("gauss_newton" if whole else "hessian")
        try:
            twice = matrix == "hessian"
            grads = torch.autograd.grad(total / units, params, retain_graph=True, create_graph=twice, allow_unused=True)
            slope = dot(grads, parts)
            if matrix == "hessian":
                curvature = _second(slope, params, parts)
            else:
                curvature = _gauss_newton(objective, batch, output, params, parts) / units
        except RuntimeError as error:
            if "not implemented" not in str(error) and "double" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise UnsupportedError(f"line_curvature: the model has no second derivative: {reason}") from error
    return LineCurvature(float(total.detach() / units), float(slope.detach()), float(curvature.detach()), matrix)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """A context with gradients on, in which attention and recurrence run in the forms that have second derivatives."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def _gauss_newton(
    objective: Objective, batch: Any, output: Tensor, params: list[Tensor], parts: list[Tensor]
) -> Tensor:
    """(JD)ᵀ L (JD): JD is the derivative by v of (Jᵀv)ᵀD, and L is applied by differentiating the criterion twice."""
    v = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, params, v, create_graph=True, allow_unused=True)
    along = dot(pulled, parts)
    pushed = torch.autograd.grad(along, v)[0] if along.requires_grad else torch.zeros_like(output)
    end = output.detach().requires_grad_()
    total, _ = objective.checked(objective.criterion(end, batch))
    (gradient,) = torch.autograd.grad(total, end, create_graph=True)
    return _second((gradient * pushed).sum(), [end], [pushed])


def _second(slope: Tensor, params: list[Tensor], parts: list[Tensor]) -> Tensor:
    """The derivative of `slope` along `parts`: zero where it does not depend on the parameters."""
    if not slope.requires_grad:
        return torch.zeros_like(slope)
    return dot(torch.autograd.grad(slope, params, allow_unused=True), parts)


def dot(grads: Sequence[Tensor | None], parts: Sequence[Tensor]) -> Tensor:
    """Σ gᵢ · dᵢ, a gradient of `None` being zero."""
    products = [(g * d).sum() for g, d in zip(grads, parts, strict=True) if g is not None]
    return torch.stack(products).sum() if products else torch.zeros(())


@dataclass(frozen=True)
class _Use:
    name: str
    module: nn.Module
    arriving: Tensor  # the layer's input, with the graph that made it
    leaving: Tensor  # the leaf that the layer was given in its place


class _Cuts:
    def __init__(self) -> None:
        self.uses: list[_Use] = []
        self.output: Tensor | None = None  # of the layer that was used last


@contextmanager
def _cut(model: nn.Module, *, only_first: bool = False) -> Iterator[_Cuts]:
    """Hooks that give every module of a block (or the first alone) a fresh leaf as input, and remember both."""
    cuts = _Cuts()

    def before(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            x = args[0] if args else kwargs.get("input")
            if not (isinstance(x, Tensor) and x.is_floating_point()):
                return None
            if in_vmap():
                raise UnsupportedError(f"{name} runs inside torch.vmap, where the graph cannot be cut")
            if x.is_nested:
                raise UnsupportedError(f"{name} is given a nested tensor, whose rows have no one shape")
            if only_first and cuts.uses:
                cuts.uses.append(_Use(name, module, x, x))
                return None
            leaf = x.detach().requires_grad_()
            cuts.uses.append(_Use(name, module, x, leaf))
            given = leaf if runs_as_its_class(module) else leaf.clone()  # a leaf allows nothing in place
            return ((given, *args[1:]), kwargs) if args else (args, kwargs | {"input": given})

        return hook

    def after(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> Tensor | None:
            place = operation_of(module).gain
            if not place or not isinstance(output, Tensor) or (only_first and cuts.uses):
                return None
            if place == "input":
                cuts.output = output
                return output.clone()  # what follows may work in place
            leaf = output.detach().requires_grad_()  # indices have no Jacobian: start at what they select
            cuts.uses.append(_Use(name, module, output, leaf))
            cuts.output = leaf.clone()
            return cuts.output

        return hook

    names: dict[nn.Module, str] = {}
    for block in blocks(model).blocks:
        for name, module in block.owners:
            names.setdefault(module, name)
    handles = []
    for module, name in names.items():
        handles += [module.register_forward_pre_hook(before(name), with_kwargs=True)]
        handles += [module.register_forward_hook(after(name))]
    try:
        yield cuts
    except RuntimeError as error:
        if "not have been used in the graph" not in str(error):
            raise
        raise UnsupportedError("the loss differentiates by the inputs, which cuts separate from it") from error
    finally:
        for handle in handles:
            handle.remove()


def leaves_of(tensor: Tensor) -> set[int]:
    """The ids of the leaf tensors that `tensor`'s graph reaches."""
    found: set[int] = set()
    seen: set[Any] = set()
    stack = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        stack.extend(parent for parent, _ in node.next_functions)
    return found
