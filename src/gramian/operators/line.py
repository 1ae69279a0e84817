"""The mean loss along a line of the parameters, to second order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gramian.calls import as_module
from gramian.errors import InputError, UnsupportedError
from gramian.linalg.engine.precision import full_precision
from gramian.objective import Objective, as_objective

__all__ = ["LineCurvature", "line_curvature"]


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
    model, objective = as_module(model, "line_curvature"), as_objective(objective)
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
    """A context with gradients on, in which attention and recurrence run in the forms that have second derivatives.

    Float32 is full float32 in it, whatever torch is told: a second derivative is a difference of much larger products.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), full_precision():
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
