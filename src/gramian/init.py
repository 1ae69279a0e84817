"""Initialization that makes every layer an isometry, so that signals and gradients cross any depth."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gramian import random
from gramian.block import Block, blocks
from gramian.calls import called
from gramian.errors import GramianWarning, InputError
from gramian.layers import is_affine, operation_of
from gramian.objective import Objective
from gramian.operators import layer_gains
from gramian.recording import measuring

__all__ = ["activation_gain", "isometric_"]

# Root mean square of the first layer's output where a sample is given: past the linear part of tanh, not saturated.
INPUT_RMS = 0.5

# On [-10, 10] for the mean over a standard normal; even, so that none is at zero, where many activations have a kink.
NUM_NODES = 20_000

# Measurements of the gains behind activations that are no modules: each changes the sizes that later layers see.
NUM_SWEEPS = 4

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
    `activation_gain`). Convolutions get Q at the center of the kernel and zeros elsewhere (delta-orthogonal), which is
    an isometry of whole images. Each matrix of a fused projection gets a Q of its own.

    Args:
        model: linear layers and convolutions are set in place; norms keep their ones and zeros. Layers of other kinds
            keep their initialization, and a `GramianWarning` names them.
        sample: a batch, `(x, y)` or `x`. With it, the order of the layers is the order of the forward pass, an
            activation that is no module (`torch.tanh(x)`) is measured, and a layer that the data enter is scaled so
            that its output has a root mean square of 0.5, whatever the units of the data.
        head_scale: gain of the last layer: small, so that training starts from nearly equal scores.
        generator: draws Q; seeded with 0 by default.
        predict: `predict(model, sample)`, where it is not `model(x)`.

    Returns:
        The model.

    Raises:
        InputError: the model has no linear layer or convolution, or the sample reaches none.

    Cost: one QR factorization for each layer; with a sample, two forward passes, and where an activation is no module,
    four measurements of `layer_gains`.
    Source: Saxe et al. (1312.6120); Pennington et al. (1711.04735); delta-orthogonal: Xiao et al. (1806.05393), §3.

    >>> net = isometric_(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    >>> w = net[2].weight.detach()
    >>> torch.allclose(w.T @ w, torch.eye(8), atol=1e-5)
    True
    """
    found, rest = blocks(model)
    layers: dict[nn.Module, Block] = {b.module: b for b in found if operation_of(b.module).init and is_affine(b.module)}
    device = next(model.parameters()).device
    generator = generator or torch.Generator(device).manual_seed(0)
    objective = Objective(predict or called, lambda output, batch: (output.sum(), 1))
    order = list(model.modules()) if sample is None else _forward_order(model, sample, objective)
    chain = [m for m in dict.fromkeys(order) if m in layers]
    if not chain:
        missing = f"the sample reaches none of {len(layers)}" if layers else f"{type(model).__name__} has none"
        raise InputError(f"isometric_: sets linear layers and convolutions, but {missing}")
    others = [b.name for b in found if b.module not in chain and b.role != "embedding"]
    others += [r.name for r in rest if r.parameter.ndim > 2 and not isinstance(r.parameter, UninitializedParameter)]
    if others:
        message = f"isometric_: sets layers that compute W x + b alone; left as they were: {', '.join(others)}"
        warnings.warn(message, GramianWarning, stacklevel=2)
    for layer, activation in _followed_by(order, layers):
        scale = activation_gain(activation) if activation is not None else 1.0
        _set_orthogonal_(layers[layer], scale, generator)
    if sample is not None:
        holders = {b.module for b in found}
        if chain[0] is next(m for m in order if m in holders):
            _scale_input_(layers[chain[0]], model, sample, objective)
        unknown = [layers[m] for m, activation in _followed_by(order, layers) if activation is None and m != chain[-1]]
        for _ in range(NUM_SWEEPS if unknown else 0):
            gains = layer_gains(model, sample, objective)  # probes drawn on the model's own device
            for block in unknown:
                gain = gains.get(block.name)
                if gain is not None and gain.chi > 0:
                    block.parameter.data /= math.sqrt(gain.chi)
    if len(chain) > 1:
        layers[chain[-1]].parameter.data *= head_scale
    return model


def activation_gain(activation: nn.Module) -> float:
    """The standard deviation σ of the weights, times √fan_in, at which an activation φ keeps the size of gradients.

    `χ = σ² E[φ'(z)²] = 1`. Where φ is linear at the origin (φ(0) = 0, φ''(0) = 0: tanh, sine, the identity) the
    critical point is at vanishing variance and `σ = 1/|φ'(0)|`; otherwise `z` is standard normal.

    Args:
        activation: a module that works element by element.

    Returns:
        σ; 1 where the derivative is zero everywhere.

    Raises: nothing of its own.
    Cost: 20,000 evaluations of φ. Accuracy: 1e-3 where φ' jumps; midpoint rule.
    Source: Poole et al. (1606.05340), eq. 3–6; Roberts, Yaida & Hanin (2106.10165), §5.1–5.3, for the universality
    classes.

    >>> round(activation_gain(nn.ReLU()) ** 2, 2), round(activation_gain(nn.Tanh()), 3)
    (2.0, 1.0)
    """
    phi = copy.deepcopy(activation).double().eval()
    channels = getattr(activation, "num_parameters", 1)  # of a PReLU

    def value(z: Tensor) -> Tensor:
        return phi(z[:, None] * torch.ones(channels, dtype=z.dtype, device=z.device))  # a copy: phi may work in place

    device = next((p.device for p in phi.parameters()), torch.device("cpu"))
    h = 1e-5
    at = torch.tensor([-h, 0.0, h], dtype=torch.float64, device=device)
    low, middle, high = value(at).detach().mean(1).tolist()
    slope, bend = (high - low) / (2 * h), (high - 2 * middle + low) / h**2
    if abs(middle) < 1e-9 and abs(bend) < 1e-3 and abs(slope) > 1e-3:
        return 1.0 / abs(slope)
    z = (torch.arange(NUM_NODES, dtype=torch.float64, device=device) + 0.5) * (20 / NUM_NODES) - 10
    weight = torch.exp(-z.square() / 2)
    z.requires_grad_()
    with torch.enable_grad():
        columns = value(z).sum(0)
        derivative = torch.stack([torch.autograd.grad(c, z, retain_graph=True)[0] for c in columns], 1)
    chi = float((derivative.square().mean(1) * weight).sum() / weight.sum())
    return 1.0 / math.sqrt(chi) if chi > 0 else 1.0


def _set_orthogonal_(block: Block, scale: float, generator: torch.Generator) -> None:
    """Sets each matrix of the block to scale · Q, for a kernel at its center alone, and the bias to zero."""
    with torch.no_grad():
        if operation_of(block.module).init == "delta":
            _set_delta_(block, scale, generator)
        else:
            q = _orthogonal(block.shape, block.parameter, generator)
            block.parameter.copy_(block.join(scale * q))
        bias = getattr(block.module, "bias", None)
        if bias is not None:
            bias.zero_()


def _set_delta_(block: Block, scale: float, generator: torch.Generator) -> None:
    kernel, groups = block.parameter, getattr(block.module, "groups", 1)
    kernel.zero_()
    center = tuple(size // 2 for size in kernel.shape[2:])
    q = _orthogonal((groups, kernel.shape[0] // groups, kernel.shape[1]), kernel, generator)
    kernel[(slice(None), slice(None), *center)] = scale * q.reshape(kernel.shape[:2])


def _orthogonal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    q = random.orthogonal(*shape, generator=generator, dtype=dtype, device=generator.device)
    return q.to(like.device, like.dtype)


def _followed_by(
    order: list[nn.Module], layers: dict[nn.Module, Block]
) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Each layer, at its first use, with the activation module that runs between it and the next layer, if any."""
    for i, module in enumerate(order):
        if module not in layers or module in order[:i]:
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
    """The leaf modules in the order in which a forward pass calls them, an activation that is shared at every call."""
    order: list[nn.Module] = []
    leaves = [m for m in model.modules() if not list(m.children())]
    with _hooked(leaves, lambda m, x, y: order.append(m)), measuring(model), torch.no_grad():
        objective.predict(model, sample)
    return order


def _scale_input_(first: Block, model: nn.Module, sample: Any, objective: Objective) -> None:
    sizes: list[Tensor] = []
    measure = _hooked([first.module], lambda m, x, y: sizes.append(_rms(y)))
    with measure, measuring(model), torch.no_grad():
        objective.predict(model, sample)
    rms = float(sizes[0]) if sizes else 0.0
    if math.isfinite(rms) and rms > 0:
        first.parameter.data *= INPUT_RMS / rms


def _rms(output: Any) -> Tensor:
    return output.float().square().mean().sqrt() if isinstance(output, Tensor) else torch.zeros(())


@contextmanager
def _hooked(modules: list[nn.Module], hook: Callable) -> Iterator[None]:
    handles = [m.register_forward_hook(lambda *args: (hook(*args), None)[1]) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
