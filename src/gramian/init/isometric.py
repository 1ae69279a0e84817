"""Initialization that makes every layer an isometry, so that signals and gradients cross any depth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gramian.calls import called
from gramian.errors import GramianWarning, InputError
from gramian.init.gains import activation_gain
from gramian.init.kernels import isometry
from gramian.init.structure import kept_in_order
from gramian.init.trained import signs_of, told
from gramian.init.weights import NOT_REACHED, PARAMETRIZED, ZERO, Weight, Weights, find_weights
from gramian.layers import operation_of
from gramian.objective import Objective
from gramian.operators import layer_gains
from gramian.recording import measuring

__all__ = ["isometric_"]

# Root mean square of the first layer's output where a sample is given: past the linear part of tanh, not saturated.
INPUT_RMS = 0.5

MOST_NAMES = 30  # in a warning, for each reason

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
    overwrite: bool = False,
) -> nn.Module:
    """Makes every layer as close to an isometry as its shape allows: `W = σ Q` with `QᵀQ = I` or `QQᵀ = I`, `b = 0`.

    σ is the gain at which the following activation keeps the size of gradients (χ = 1): 1 for tanh, √2 for ReLU (see
    `activation_gain`). Each matrix of a fused projection gets a Q of its own. A parametrized weight (weight norm,
    spectral norm, orthogonality) is set so that the weight that is applied is the isometry, with σ = 1 where the
    parametrization fixes the size.

    - Convolutions of stride one, padded so that no input is cut off, get Q at one tap and zeros elsewhere
      (delta-orthogonal): an exact isometry of whole images.
    - Other convolutions get a kernel that is orthogonal over all of its taps, so that every input counts. With a kernel
      as long as its stride (patches) that is an exact isometry, or a projection; where windows overlap it only keeps
      the mean square of white inputs, on average over images.
    - A transposed convolution is set as the adjoint of a convolution.

    With a sample, matrices that a norm or a skip already keeps in order are left as they were: those whose scale a norm
    restores before the next matrix, and those in a residual branch, unless the sample's variance changes there by a
    factor outside 1e-4 to 100 (behind a norm) or to 10 (in a branch). Without a sample, norms and skips are not seen.

    What is left as it was, and named in a `GramianWarning`: these, layers that do more than `W x + b`, frozen weights,
    the parts of PEFT's adapters, depthwise kernels, and weights that are zero, as residual branches and adapters are
    where they start from the identity. A zero weight is set where all are zero, or where the sample shows that it makes
    the next layer's input the same for all samples. Embeddings, tables tied to a head, and norms keep their
    initialization by definition.

    Args:
        model: set in place.
        sample: a batch, `(x, y)` or `x`. With it, the order of the layers is the order of the forward pass, an
            activation that is no module (`torch.tanh(x)`) is measured, and a layer that the data enter is scaled so
            that its output has a root mean square of 0.5, whatever the units of the data.
        head_scale: gain of the last layer: small, so that training starts from nearly equal scores.
        generator: draws Q; seeded with 0 by default.
        predict: `predict(model, sample)`, where it is not `model(x)`.
        overwrite: whether to set also weights that look trained (see `signs_of_training`).

    Returns:
        The model.

    Raises:
        InputError: the model has no linear layer or convolution that is trainable, or the sample reaches none; weights
            look trained, and `overwrite` is false; weights have no values (meta) or a dtype of less than two bytes.

    Cost: one QR factorization for each layer, and the singular values of at most 512 × 512 entries of each; with a
    sample, four forward passes, one of which keeps its graph, and where an activation is no module, four measurements
    of `layer_gains`.
    Source: Saxe et al. (1312.6120); Pennington et al. (1711.04735); delta-orthogonal: Xiao et al. (1806.05393), §3.

    >>> net = isometric_(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    >>> w = net[2].weight.detach()
    >>> torch.allclose(w.T @ w, torch.eye(8), atol=1e-5)
    True
    """
    objective = Objective(predict or called, lambda output, batch: (output.sum(), 1))
    _check_values(model, sample, objective)
    weights = find_weights(model)
    layers = weights.by_layer
    device = next(model.parameters()).device
    generator = generator or torch.Generator(device).manual_seed(0)
    order = list(model.modules()) if sample is None else _forward_order(model, layers, sample, objective)
    chain = _first_uses(order, layers)
    if not chain:
        missing = f"the sample reaches none of {len(layers)}" if layers else f"{type(model).__name__} has none"
        raise InputError(
            f"isometric_: sets linear layers and convolutions, but {missing} that it may set{_told(weights)}"
        )
    if not overwrite and (signs := signs_of(model, [layers[m].block for m in chain])):
        raise InputError(
            f"isometric_: these weights look trained: {told(signs)}. Pass overwrite=True to replace them all the same"
        )
    zero = [m for m in chain if not bool(layers[m].value.any())]
    zero = zero if len(zero) < len(chain) else []
    kept = {} if sample is None else kept_in_order(model, layers, weights.depthwise, sample, objective)
    kept = {m: reason for m, reason in kept.items() if m in chain and m not in zero}
    for layer, reason in kept.items():
        weights.leave(reason, layers[layer].block.name)
    for layer, activation in _followed_by(order, layers):
        if layer in chain and layer not in zero and layer not in kept:
            _set_isometry_(layers[layer], activation, generator, weights)
    for layer in zero:
        if sample is not None and _cuts_off(layer, order, layers, model, sample, objective):
            activation = next(after for m, after in _followed_by(order, layers) if m is layer)
            _set_isometry_(layers[layer], activation, generator, weights)
        else:
            weights.leave(ZERO, layers[layer].block.name)
    left = {name for names in weights.left.values() for name in names}
    chain = [m for m in chain if layers[m].block.name not in left]
    if not chain and not kept:
        raise InputError(f"isometric_: {type(model).__name__} has no layer that it may set{_told(weights)}")
    reached = {layers[m] for m in order if m in layers}
    for weight in dict.fromkeys(layers.values()):
        if weight not in reached:
            weights.leave(NOT_REACHED, weight.block.name)
    if weights.left:
        warnings.warn(f"isometric_: {_told(weights).removeprefix('; ')}", GramianWarning, stacklevel=2)
    if sample is not None and chain:
        if chain[0] is next(m for m in order if m in layers or m in weights.others):
            _scale_input_(layers[chain[0]], model, sample, objective)
        unknown = [m for m, activation in _followed_by(order, layers) if activation is None and m in chain[:-1]]
        for _ in range(NUM_SWEEPS if unknown else 0):
            gains = layer_gains(model, sample, objective)  # probes drawn on the model's own device
            for weight in [layers[m] for m in unknown]:
                gain = gains.get(weight.block.name)
                if gain is not None and gain.chi > 0:
                    weight.set_(weight.value / math.sqrt(gain.chi))
    if len(chain) > 1 and chain[-1] is [m for m in dict.fromkeys(order) if operation_of(m).init][-1]:
        weight = layers[chain[-1]]
        weight.set_(weight.value * head_scale)
    return model


def _check_values(model: nn.Module, sample: Any, objective: Objective) -> None:
    """Refuses weights without values; gives lazy modules their shapes by the sample."""
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta:
        raise InputError(
            f"isometric_: {meta[0]} has no values, since it is on the meta device. Give the model memory first: "
            "model.to_empty(device=...)"
        )
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy and sample is None:
        raise InputError(
            f"isometric_: {lazy[0]} has no shape yet. Pass a sample, or run a batch through the model first"
        )
    if lazy:
        with measuring(model), torch.no_grad():
            objective.predict(model, sample)


def _told(weights: Weights) -> str:
    """What is left, by reason, each after a semicolon."""
    text = ""
    for reason, names in weights.left.items():
        some = ", ".join(names[:MOST_NAMES]) + (
            f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        )
        text += f"; {reason}: {some}"
    return text


def _first_uses(order: list[nn.Module], layers: Mapping[nn.Module, Weight]) -> list[nn.Module]:
    """The layers in the order of their first use; of several with one tied weight, the first."""
    first: dict[Weight, nn.Module] = {}
    for m in order:
        if m in layers:
            first.setdefault(layers[m], m)
    return list(first.values())


def _set_isometry_(weight: Weight, activation: nn.Module | None, generator: torch.Generator, weights: Weights) -> None:
    """Sets σ Q and zeroes the bias; notes where a parametrization forbids it."""
    scale = activation_gain(activation) if activation is not None else 1.0
    block = weight.block
    value = scale * isometry(weight.layer, block.layout, block.parameter.detach(), generator)
    if not weight.set_(value):
        weights.leave(PARAMETRIZED, block.name)
        return
    bias = getattr(weight.layer, "bias", None)
    if bias is not None and bias.requires_grad:
        bias.data.zero_()


def _cuts_off(
    layer: nn.Module,
    order: list[nn.Module],
    layers: Mapping[nn.Module, Weight],
    model: nn.Module,
    sample: Any,
    objective: Objective,
) -> bool:
    """Whether a layer's zero weight makes the next layer's input the same for all samples, though its own differ.

    Then no other path goes around it, and what comes before it cannot be learned.
    """
    following = order[order.index(layer) + 1 :]
    after = next((m for m in following if m in layers and layers[m] is not layers[layer]), None)
    if after is None:
        return False
    differ: dict[nn.Module, bool] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_floating_point():
            differ.setdefault(module, bool((x - x[:1]).abs().max() > 1e-6 * x.abs().max()))

    with _hooked([layer, after], note), measuring(model), torch.no_grad():
        objective.predict(model, sample)
    return differ.get(layer, False) and not differ.get(after, True)


def _followed_by(
    order: list[nn.Module], layers: Mapping[nn.Module, Weight]
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


def _forward_order(
    model: nn.Module, layers: Mapping[nn.Module, Weight], sample: Any, objective: Objective
) -> list[nn.Module]:
    """The leaf modules in the order in which a forward pass calls them, an activation that is shared at every call."""
    order: list[nn.Module] = []
    leaves = [m for m in model.modules() if m in layers or not list(m.children())]  # a parametrized layer has children
    with _hooked(leaves, lambda m, x, y: order.append(m)), measuring(model), torch.no_grad():
        objective.predict(model, sample)
    return order


def _scale_input_(first: Weight, model: nn.Module, sample: Any, objective: Objective) -> None:
    sizes: list[Tensor] = []
    measure = _hooked([first.layer], lambda m, x, y: sizes.append(_rms(y)))
    with measure, measuring(model), torch.no_grad():
        objective.predict(model, sample)
    rms = float(sizes[0]) if sizes else 0.0
    if math.isfinite(rms) and rms > 0:
        first.set_(first.value * (INPUT_RMS / rms))


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
