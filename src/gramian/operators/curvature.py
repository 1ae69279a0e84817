"""The Hessian, the Gauss–Newton and the Fisher matrix of a loss as linear maps over the trainable parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gramian.batch import described
from gramian.calls import as_model
from gramian.errors import InputError, ShapeError, UnsupportedError
from gramian.loader import Batches, as_batches, no_batches
from gramian.objective import Objective, as_objective
from gramian.operators.line import dot, twice_differentiable
from gramian.recording import measuring

__all__ = ["Curvature", "fisher", "gauss_newton", "hessian"]

Grads = Sequence[Tensor | None]
# From parts of a vector, one for each parameter, to the parts of its product, `None` where that is zero.
Product = Callable[[list[Tensor]], Grads]
# (objective, output, batch, parameters) -> (product with the sum over the batch, number of units)
Made = Callable[[Objective, Any, Any, list[Tensor]], tuple[Product, Tensor]]


@dataclass(eq=False)
class Curvature:
    """A symmetric `gm.linalg.LinearMap` over the trainable parameters of a model, made by `hessian` and its like.

    A vector holds the parameters one after the other, each flattened, in the order of `model.named_parameters()`; a
    tied parameter appears once. The map reads the parameters at every product, so it follows a model in training.

    Args:
        model: any module.
        batches: all of them count at every product.
        objective: what is measured.
        parameters: the trainable parameters by name.
        make: prepares the products of one batch.

    >>> net, batches = nn.Linear(2, 1), [(torch.eye(2), torch.zeros(2, 1))]
    >>> h = hessian(net, batches, Objective.regression())
    >>> h.shape, h.slices
    ((3, 3), {'weight': slice(0, 2, None), 'bias': slice(2, 3, None)})
    """

    model: nn.Module
    batches: list[Any]
    objective: Objective
    parameters: dict[str, nn.Parameter]
    make: Made
    num_products: int = field(default=0, init=False)
    """The vectors multiplied so far."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n), n being the number of trainable parameters."""
        n = sum(p.numel() for p in self.parameters.values())
        return n, n

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the parameters."""
        dtypes = [p.dtype for p in self.parameters.values()]
        widest = dtypes[0]
        for dtype in dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        return widest

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        return next(iter(self.parameters.values())).device

    @property
    def slices(self) -> dict[str, slice]:
        """Where each parameter stands in a vector, by name."""
        found, start = {}, 0
        for name, p in self.parameters.items():
            found[name] = slice(start, start + p.numel())
            start += p.numel()
        return found

    def unflatten(self, x: Tensor) -> dict[str, Tensor]:
        """The parts of a vector x (n,) by the name of the parameter, in its shape."""
        return {name: x[s].reshape(self.parameters[name].shape) for name, s in self.slices.items()}

    def matvec(self, x: Tensor, /) -> Tensor:
        """The product with x (n,)."""
        return self.matmat(x[:, None])[:, 0]

    def matmat(self, x: Tensor, /) -> Tensor:
        """The product with X (n, b): for each batch one forward and one backward pass, and about two for each column.

        Raises `UnsupportedError` where an operation of the model has no second derivative.
        """
        n = self.shape[0]
        if x.ndim != 2 or len(x) != n:
            raise ShapeError(f"matmat: expected (n, b) with n = {n} trainable parameters, got {tuple(x.shape)}")
        params = list(self.parameters.values())
        columns = [[part.to(p.dtype) for p, part in zip(params, self.unflatten(c).values(), strict=True)] for c in x.T]
        total = torch.zeros(x.shape[1], n, dtype=self.dtype, device=self.device)
        units = 0.0
        with measuring(self.model), twice_differentiable():
            for batch in self.batches:
                output = self.objective.predict(self.model, batch)
                try:
                    product, count = self.make(self.objective, output, batch, list(params))
                    for row, parts in zip(total, columns, strict=True):
                        row += _flat(product(parts), params).to(row.dtype)
                except RuntimeError as error:
                    _explained(error)
                units += float(count)
        self.num_products += x.shape[1]
        return (total / units).T.to(x.dtype)

    def adjoint(self) -> Curvature:
        """The map itself, which is symmetric."""
        return self


def hessian(model: nn.Module, batches: Batches, objective: Objective | Callable) -> Curvature:
    """The Hessian of the mean loss by the trainable parameters, as a linear map.

    `gm.linalg.eigvalsh_top`, `spectral_norm`, `spectral_density`, `svd_lowrank` and `cond` take it. The loss is the
    mean over the units of all batches, in evaluation mode: no dropout, and batch norms with their stored statistics.
    Inside `gramian.recording.measuring.batch_statistics(model)` they use those of each batch.
    The model is left as it was.

    Args:
        model: any module with trainable parameters, all on one device.
        batches: a `DataLoader`, a list or another iterable of batches, or a function that returns one; all are kept.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean`.

    Returns: a `Curvature`; nothing is computed before its first product.
    Raises:
        InputError: there are no batches, or no trainable parameters.
        UnsupportedError: parameters on several devices; later, an operation without a second derivative.
    Cost: a product takes about four passes of every batch, more vectors at once about two each. Accuracy: exact to the
        rounding of the parameters' dtype. Attention and recurrence run in their unfused forms.
    Source: Pearlmutter, Neural Computation 6 (1994).

    >>> net, batches = nn.Linear(2, 1, bias=False), [(torch.eye(2), torch.zeros(2, 1))]
    >>> hessian(net, batches, Objective.regression()).matmat(torch.eye(2)).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    return _curvature("hessian", model, batches, objective, _hessian_of)


def gauss_newton(model: nn.Module, batches: Batches, objective: Objective | Callable) -> Curvature:
    """The Gauss–Newton matrix JᵀLJ of the mean loss, L being the Hessian of the criterion by the model's output.

    For a convex criterion it has no negative eigenvalues. For cross-entropy and squared error it is the Fisher matrix
    of the model's own predictions. Mean, mode and order of the parameters are as for `hessian`.

    Args:
        model: any module with trainable parameters, all on one device.
        batches: as for `hessian`.
        objective: `gm.Objective` whose `predict` returns a tensor.

    Returns: a `Curvature`.
    Raises:
        InputError: there are no batches, no trainable parameters, or the objective is a plain loss; later, its output
            is not a tensor.
        UnsupportedError: as for `hessian`.
    Cost: as `hessian`. Accuracy: exact to the rounding of the parameters' dtype.
    Source: Schraudolph, Neural Computation 14 (2002), §3.

    >>> net, batches = nn.Linear(2, 1, bias=False), [(torch.eye(2), torch.zeros(2, 1))]
    >>> gauss_newton(net, batches, Objective.regression()).matmat(torch.eye(2)).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    return _curvature("gauss_newton", model, batches, _with_output("gauss_newton", objective), _gauss_newton_of)


def fisher(model: nn.Module, batches: Batches, objective: Objective | Callable) -> Curvature:
    """The empirical Fisher matrix Σ gᵢgᵢᵀ / units, gᵢ being the gradient of the sum of losses of sample i.

    A sample is an index of the first dimension of the output. The gradients are those of the labels in the batch; for
    labels drawn from the model's predictions, the expected matrix is `gauss_newton`. Where a sample has several units
    (tokens), gᵢ is the sum over them. Mode and order of the parameters are as for `hessian`.

    Args:
        model: any module with trainable parameters, all on one device.
        batches: as for `hessian`.
        objective: `gm.Objective` whose `predict` returns a tensor, with a criterion that is a sum over samples.

    Returns: a `Curvature`.
    Raises:
        InputError, UnsupportedError: as for `gauss_newton`.
    Cost: as `hessian`. Accuracy: exact to the rounding of the parameters' dtype.
    Source: Kunstner, Balles, Hennig, arXiv:1905.12558, eq. 3.

    >>> net, batches = nn.Linear(2, 1, bias=False), [(torch.eye(2), torch.ones(2, 1))]
    >>> _ = net.weight.data.zero_()
    >>> fisher(net, batches, Objective.regression()).matmat(torch.eye(2)).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    return _curvature("fisher", model, batches, _with_output("fisher", objective), _fisher_of)


def _curvature(name: str, model: Any, batches: Any, objective: Any, make: Made) -> Curvature:
    model, objective = as_model(model, name), as_objective(objective)
    kept = list(as_batches(batches, name))
    if not kept:
        raise no_batches(batches, name)
    params = {key: p for key, p in model.named_parameters() if p.requires_grad and p.numel()}
    if not params:
        raise InputError(f"{name}: the model has no trainable parameter. Set requires_grad_() on some")
    devices = {p.device for p in params.values()}
    if len(devices) > 1:
        raise UnsupportedError(f"{name}: parameters on one device are wanted, got {sorted(map(str, devices))}")
    if next(iter(devices)).type == "meta":
        raise UnsupportedError(f"{name}: the parameters are on the meta device and have no values. Load the weights")
    return Curvature(model, kept, objective, params, make)


def _with_output(name: str, objective: Any) -> Objective:
    if not isinstance(objective, Objective):
        raise InputError(
            f"{name}: expected gm.Objective, which separates the output from the loss, got {described(objective)}. "
            "Write gm.Objective(predict, criterion), or take gm.operators.hessian"
        )
    return objective


def _hessian_of(objective: Objective, output: Any, batch: Any, params: list[Tensor]) -> tuple[Product, Tensor]:
    total, units = objective.checked(objective.criterion(output, batch))
    grads: Grads = [None] * len(params)
    if total.requires_grad:
        grads = torch.autograd.grad(total, params, create_graph=True, allow_unused=True)

    def product(parts: list[Tensor]) -> Grads:
        return _gradient(dot(grads, parts), params)

    return product, units


def _gauss_newton_of(objective: Objective, output: Any, batch: Any, params: list[Tensor]) -> tuple[Product, Tensor]:
    push, gradient, end, units = _linearized("gauss_newton", objective, output, batch, params, create_graph=True)

    def product(parts: list[Tensor]) -> Grads:
        (bent,) = _gradient((gradient * push(parts)).sum(), [end])
        return [None] * len(params) if bent is None else _gradient(output, params, bent)

    return product, units


def _fisher_of(objective: Objective, output: Any, batch: Any, params: list[Tensor]) -> tuple[Product, Tensor]:
    push, gradient, _, units = _linearized("fisher", objective, output, batch, params, create_graph=False)

    def product(parts: list[Tensor]) -> Grads:
        slopes = (gradient * push(parts)).flatten(1).sum(1) if gradient.ndim > 1 else gradient * push(parts)
        return _gradient(output, params, gradient * slopes.reshape(-1, *[1] * (gradient.ndim - 1)))

    return product, units


def _linearized(
    name: str, objective: Objective, output: Any, batch: Any, params: list[Tensor], *, create_graph: bool
) -> tuple[Callable[[list[Tensor]], Tensor], Tensor, Tensor, Tensor]:
    """D → JD, the criterion's gradient by the output, the output as a leaf, and the number of units.

    JD is the derivative by v of (Jᵀv)ᵀD, which needs backward passes alone.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or not output.ndim:
        raise InputError(
            f"{name}: expected an objective whose predict() returns a tensor with a row for each sample, got "
            f"{described(output)}. Give Objective(predict=...), or take gm.operators.hessian"
        )
    v = torch.zeros_like(output, requires_grad=True)
    pulled: Grads = [None] * len(params)
    if output.requires_grad:
        pulled = torch.autograd.grad(output, params, v, create_graph=True, allow_unused=True)
    end = output.detach().requires_grad_()
    total, units = objective.checked(objective.criterion(end, batch))
    (gradient,) = torch.autograd.grad(total, end, create_graph=create_graph)

    def push(parts: list[Tensor]) -> Tensor:
        (pushed,) = _gradient(dot(pulled, parts), [v])
        return torch.zeros_like(output) if pushed is None else pushed

    return push, gradient, end, units


def _gradient(of: Tensor, by: list[Tensor], weights: Tensor | None = None) -> Grads:
    """The gradient, with the graph kept for the next product; `None` where nothing depends on it."""
    if not of.requires_grad:
        return [None] * len(by)
    return torch.autograd.grad(of, by, weights, retain_graph=True, allow_unused=True)


def _flat(grads: Grads, params: Sequence[Tensor]) -> Tensor:
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
    return torch.cat([g.detach().reshape(-1) for g in parts])


def _explained(error: RuntimeError) -> NoReturn:
    if "not implemented" not in str(error) and "double" not in str(error):
        raise error
    reason = str(error).splitlines()[0]
    raise UnsupportedError(f"matmat: the model has no second derivative: {reason}") from error
