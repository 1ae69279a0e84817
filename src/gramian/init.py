"""Initialisation that keeps every layer an isometry, so that signals and gradients cross any depth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gramian import random
from gramian.block import Block, blocks
from gramian.capturing import evaluating
from gramian.errors import GramianWarning, InputError
from gramian.objective import Objective
from gramian.operators import layer_gains

__all__ = ["activation_gain", "isometric_"]

# Root mean square of the first layer's output where a sample is given: past the linear part of tanh, short of saturation.
INPUT_RMS = 0.5

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NOT_ELEMENTWISE = (nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d, nn.GLU)


def isometric_(
    model: nn.Module,
    sample: Any = None,
    *,
    head_scale: float = 0.1,
    generator: torch.Generator | None = None,
    predict: Callable[[nn.Module, Any], Any] | None = None,
) -> nn.Module:
    """Makes every layer as close to an isometry as its shape allows: `W = σ Q` with `QᵀQ = I` or `QQᵀ = I`, `b = 0`.

    σ is the gain at which the following activation keeps the size of gradients (χ = 1): 1 for tanh, √2 for ReLU (see
    `activation_gain`). Convolutions get Q at the centre of the kernel and zeros elsewhere (delta-orthogonal), which is
    an isometry of whole images.

    Args:
        model: Linear and Conv1d/2d/3d layers are set in place; norms keep their ones and zeros. Layers of other kinds
            keep their initialisation, and a `GramianWarning` names them.
        sample: a batch, `(x, y)` or `x`. With it, the order of the layers is the order of the forward pass, an
            activation that is no module (`torch.tanh(x)`) is measured, and the first layer is scaled so that its output
            has a root mean square of 0.5, whatever the units of the data.
        head_scale: gain of the last layer: small, so that training starts from nearly equal scores.
        generator: draws Q; seeded with 0 by default.
        predict: `predict(model, sample)`, where it is not `model(x)`.

    Returns:
        The model.

    Cost: one QR factorisation for each layer; with a sample, three forward passes.
    Source: Saxe et al. (1312.6120); Pennington et al. (1711.04735); delta-orthogonal: Xiao et al. (1806.05393), §3.

    >>> net = isometric_(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    >>> w = net[2].weight.detach()
    >>> torch.allclose(w.T @ w, torch.eye(8), atol=1e-5)
    True
    """
    found = blocks(model).blocks
    layers = {b.module: b for b in found if isinstance(b.module, (nn.Linear, *_CONV))}
    if not layers:
        raise InputError(f"isometric_: {type(model).__name__} has no Linear or convolution to initialise")
    others = [b.name for b in found if b.module not in layers and b.role != "embedding"]
    if others:
        warnings.warn(f"isometric_: left as they were: {', '.join(others)}", GramianWarning, stacklevel=2)
    device = found[0].parameter.device
    generator = generator or torch.Generator(device).manual_seed(0)
    objective = Objective(predict or _predict, lambda output, batch: (output.sum(), 1))
    order = list(model.modules()) if sample is None else _forward_order(model, sample, objective)
    chain = [m for m in order if m in layers]
    for layer, activation in _followed_by(order, layers):
        scale = activation_gain(activation) if activation is not None else 1.0
        _set_orthogonal_(layers[layer], scale, generator)
    if sample is not None:
        _scale_input_(chain[0], model, sample, objective)
        unknown = {layers[layer].name: layer for layer, activation in _followed_by(order, layers) if activation is None}
        gains = layer_gains(model, sample, objective, generator=generator)
        for name, layer in unknown.items():
            gain = gains.get(name)
            if gain is not None and layer is not chain[-1] and gain.chi > 0:
                layer.weight.data /= math.sqrt(gain.chi)
    if len(chain) > 1:
        chain[-1].weight.data *= head_scale
    return model


def activation_gain(activation: nn.Module) -> float:
    """The standard deviation σ of the weights, times √fan_in, at which an activation φ keeps gradients' size.

    `χ = σ² E[φ'(z)²] = 1`. Where φ is linear at the origin (φ(0) = 0, φ''(0) = 0: tanh, sine, the identity) the
    critical point is at vanishing variance and `σ = 1/|φ'(0)|`; otherwise `z` is standard normal.

    Accuracy: 256-point Gauss–Hermite quadrature. Source: Poole et al. (1606.05340), eq. 3–6; Roberts, Yaida & Hanin
    (2106.10165), §5.1–5.3, for the universality classes.

    >>> round(activation_gain(nn.ReLU()) ** 2, 2), round(activation_gain(nn.Tanh()), 3)
    (2.0, 1.0)
    """
    h = 1e-3
    at = torch.tensor([-h, 0.0, h], dtype=torch.float64)
    low, middle, high = activation(at).tolist()
    slope, bend = (high - low) / (2 * h), (high - 2 * middle + low) / h**2
    if abs(middle) < 1e-9 and abs(bend) < 1e-3 and abs(slope) > 1e-3:
        return 1.0 / abs(slope)
    z, weight = _gauss_hermite(256)
    z.requires_grad_()
    with torch.enable_grad():
        (derivative,) = torch.autograd.grad(activation(z).sum(), z)
    chi = float((derivative.square() * weight).sum())
    return 1.0 / math.sqrt(chi) if chi > 0 else 1.0


def _gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights for the mean over a standard normal: eigenvalues of the Jacobi matrix (Golub & Welsch 1969)."""
    off = torch.arange(1, n, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0].square()


def _predict(model: nn.Module, batch: Any) -> Any:
    return model(batch if isinstance(batch, Tensor) else batch[0])


def _set_orthogonal_(block: Block, scale: float, generator: torch.Generator) -> None:
    weight = block.parameter
    with torch.no_grad():
        if isinstance(block.module, _CONV):
            groups = block.module.groups
            weight.zero_()
            centre = tuple(size // 2 for size in weight.shape[2:])
            q = _orthogonal(groups, weight.shape[0] // groups, weight.shape[1], weight, generator)
            weight[(slice(None), slice(None), *centre)] = scale * q.reshape(weight.shape[:2])
        else:
            weight.copy_(scale * _orthogonal(1, *weight.shape, weight, generator)[0])
        bias = getattr(block.module, "bias", None)
        if bias is not None:
            bias.zero_()


def _orthogonal(k: int, m: int, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
    q = random.orthogonal(k, m, n, generator=generator, dtype=torch.float32, device=generator.device)
    return q.to(like.device, like.dtype)


def _followed_by(order: list[nn.Module], layers: dict[nn.Module, Block]) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Each layer with the activation module that runs between it and the next layer, if there is one."""
    for i, module in enumerate(order):
        if module not in layers:
            continue
        activation = None
        for later in order[i + 1 :]:
            if later in layers:
                break
            if type(later).__module__ == "torch.nn.modules.activation" and not isinstance(later, _NOT_ELEMENTWISE):
                activation = later
                break
        yield module, activation


def _forward_order(model: nn.Module, sample: Any, objective: Objective) -> list[nn.Module]:
    """The leaf modules in the order in which a forward pass calls them (each at its first call)."""
    order: dict[nn.Module, None] = {}
    with _hooked([m for m in model.modules() if not list(m.children())], lambda m, x, y: order.setdefault(m)):
        with evaluating(model), torch.no_grad():
            objective.predict(model, sample)
    return list(order)


def _scale_input_(first: nn.Module, model: nn.Module, sample: Any, objective: Objective) -> None:
    sizes: list[Tensor] = []
    with _hooked([first], lambda m, x, y: sizes.append(y.float().square().mean().sqrt())):
        with evaluating(model), torch.no_grad():
            objective.predict(model, sample)
    rms = float(sizes[0])
    if math.isfinite(rms) and rms > 0:
        first.weight.data *= INPUT_RMS / rms


@contextmanager
def _hooked(modules: list[nn.Module], hook: Callable) -> Iterator[None]:
    handles = [m.register_forward_hook(lambda *args: (hook(*args), None)[1]) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
