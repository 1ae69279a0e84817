"""Initialization that makes every layer an isometry, so that signals and gradients cross any depth."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gramian.calls import as_module, called
from gramian.errors import GramianWarning, InputError, some
from gramian.init.composed import leave_composed, set_composed_
from gramian.init.paths import hooked, normalized, trace
from gramian.init.reached import State
from gramian.init.setting import Setting
from gramian.init.weights import BYPASSED, NORMALIZED, NOT_REACHED, ZERO, Weight, Weights, find_weights
from gramian.inspection.weights.trained import signs_of, told
from gramian.layers import operation_of
from gramian.objective import Objective
from gramian.recording import measuring
from gramian.recording.forward_failures import naming_the_layer

__all__ = ["isometric_"]

# The mean square of a layer's output over that of its input. Below 1 at most initializations of transformers (0.02²
# times the width, over twice the depth at the end of a branch); a kaiming kernel that narrows four times is at 8.
HEALTHY = {NORMALIZED: (1e-4, 1e2), BYPASSED: (1e-4, 10.0)}

MOST_NAMES = 30  # in a warning, for each reason

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
    """Makes every layer whose size matters as close to an isometry as its shape allows: `W = σ Q`, Q orthogonal.

    σ is the gain at which the following activation keeps the size of gradients (χ = 1; see `activation_gain`), and the
    bias is zero. Each matrix of a fused projection gets a Q of its own. A parametrized weight (weight norm, spectral
    norm, orthogonality) is set so that the weight that is applied is the isometry, with σ = 1 where the parametrization
    fixes the size.

    - Linear layers with an activation between them for which φ(z) − φ(−z) = c z (ReLU, GELU, SiLU, softplus), and an
      even width, get `[Q, −Q; −Q, Q] / c`: what they compute is linear at first, and an exact isometry at any depth.
    - Before other smooth activations (ELU, SELU, Mish) signals keep their size at one mean square q, and with biases:
      they are drawn, and q is held at the stable critical point by a forward pass.
    - Convolutions of stride one, padded so that no input is cut off, get Q at one tap and zeros elsewhere
      (delta-orthogonal): an exact isometry of whole images.
    - Other convolutions get a kernel that is orthogonal over all of its taps, so that every input counts. With a kernel
      as long as its stride (patches) that is an exact isometry, or a projection; where windows overlap it only keeps
      the mean square of white inputs, on average over images.
    - A transposed convolution is set as the adjoint of a convolution.
    - Each matrix of `nn.MultiheadAttention`, and of each gate of LSTM, GRU, RNN and their cells, gets a Q with σ = 1;
      forget gates of an LSTM a bias of one. Attention in a residual branch is left where all its sizes are usual.

    With a sample, matrices that a norm or a skip already keeps in order are left: layers whose scale a norm undoes
    (measured: the derivative along the output is zero), and layers of residual branches (in the graph of the forward
    pass) of at most four in a row; unless the sample's mean square changes over a layer by a factor outside 1e-4 to 100
    (before a norm) or to 10 (in a branch). Only where the residual stream is seen to grow more than tenfold, the last
    layers of its branches are scaled, by 1/√(number of branches) or less. Without a sample every matrix is set.
    Where signals or gradients then change twice as much over the depth as before, and tenfold, all is put back.

    What is left as it was is named in a `GramianWarning`: these; layers that do more than `W x + b`, frozen
    weights, the parts of PEFT's adapters, depthwise kernels, and weights that are zero, as residual branches and
    adapters are where they start from the identity. A zero weight is set where all are zero, or where the sample
    shows that it makes the next layer's input the same for all samples. Embeddings, tables tied to a head, and
    norms keep their initialization by definition. The warning also says what no initialization reaches: "beyond
    initialization", where gradients or signals still change by a factor of 100 over the depth (softplus, sigmoid, gates
    without norms); and which trained weights were replaced.

    Args:
        model: set in place.
        sample: a batch, `(x, y)` or `x`. Pass it: with it, the order of the layers is the order of the forward pass, an
            activation that is no module (`torch.tanh(x)`) is measured, and a layer that the data enter is scaled so
            that its output has a root mean square of 0.5, whatever the units of the data.
        head_scale: gain of the last layer where the layer before it is set too: small, so that training starts from
            nearly equal scores.
        generator: draws Q; seeded with 0 by default.
        predict: `predict(model, sample)`, where it is not `model(x)`.
        overwrite: whether to set also weights that look trained (see `signs_of_training`), and lose what they learned.

    Returns:
        The model.

    Raises:
        InputError: the model has no linear layer or convolution that is trainable, or the sample reaches none; weights
            look trained, and `overwrite` is false; weights have no values (meta) or a dtype of less than two bytes.

    Cost: one QR factorization for each layer, and the singular values of at most 512 × 512 entries of each; with a
    sample, some ten forward and ten backward passes, and where pooling or the like stands between layers four
    measurements of `layer_gains`.
    Source: Saxe et al. (1312.6120); Pennington et al. (1711.04735); delta-orthogonal: Xiao et al. (1806.05393), §3;
    `[Q, −Q; −Q, Q]`: Balduzzi et al. (1702.08591), §5; holding q: Mishkin & Matas (1511.06422).

    >>> net = isometric_(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    >>> w = net[2].weight.detach()
    >>> torch.allclose(w.T @ w, torch.eye(8), atol=1e-5)
    True
    """
    objective = Objective(predict or called, lambda output, batch: (output.sum(), 1))
    _check_values(as_module(model, "isometric_"), sample, objective)
    weights = find_weights(model)
    layers = weights.by_layer
    device = next(model.parameters()).device
    generator = generator or torch.Generator(device).manual_seed(0)
    with naming_the_layer("isometric_", sample, objective, model):
        order = list(_registered(model)) if sample is None else _forward_order(model, weights, sample, objective)
    chain = _first_uses(order, layers)
    if not chain and not weights.composed:
        missing = f"the sample reaches none of {len(layers)}" if layers else f"{type(model).__name__} has none"
        raise InputError(
            "isometric_: sets linear layers, convolutions, attention and recurrence, but "
            f"{missing} that it may set{_told(weights)}"
        )
    composed = [weight.block for held in weights.composed.values() for weight in held]
    signs = signs_of(model, [layers[m].block for m in chain] + composed)
    if signs and not overwrite:
        raise InputError(
            f"isometric_: these weights look trained: {told(signs)}. Pass overwrite=True to replace them all the same"
        )
    zero = [m for m in chain if not bool(layers[m].value.any())]
    zero = zero if len(zero) < len(chain) else []
    around, ends = list[nn.Module](), list[nn.Module]()
    if sample is not None:
        around, ends = _leave_what_needs_none(
            model, [m for m in chain if m not in zero], order, weights, sample, objective
        )
    left = {name for names in weights.left.values() for name in names}
    chosen = [m for m in chain if m not in zero and layers[m].block.name not in left]
    setting = Setting(model, sample, objective, weights, generator)
    before = State.of(model, chosen[:-1], sample, objective)
    composed_set = set_composed_(weights, generator)
    points = setting.critical_points(chosen, _followed_by(order, weights))
    setting.mirror(chosen, order, points)
    chosen = [m for m in chosen if setting.isometry_(m, points.get(m))]
    for layer in zero:
        if sample is None or not _cuts_off(layer, order, layers, model, sample, objective):
            weights.leave(ZERO, layers[layer].block.name)
            continue
        points |= setting.critical_points([layer], _followed_by(order, weights))
        if setting.isometry_(layer, points.get(layer)):
            chosen = [m for m in chain if m in chosen or m is layer]
    reached = {layers[m] for m in order if m in layers}
    for weight in dict.fromkeys(layers.values()):
        if weight not in reached:
            weights.leave(NOT_REACHED, weight.block.name)
    if not chosen and not composed_set and not (weights.left.keys() & {NORMALIZED, BYPASSED}):
        raise InputError(f"isometric_: {type(model).__name__} has no layer that it may set{_told(weights)}")
    entered = next((m for m in order if m in layers or m in weights.others), None)
    setting.sizes_(chosen, points, entered)
    notes = setting.branches_(around, ends)
    hidden = chosen[:-1] if chosen and chosen[-1] is chain[-1] else chosen
    setting.sweep_([m for m in hidden if m not in points])
    restored = before.restore_if_better_(model, sample, objective)
    notes += restored or setting.beyond([m for m in hidden if m is not entered], points)
    is_head = bool(chosen) and chosen[-1] is [m for m in dict.fromkeys(order) if operation_of(m).init][-1]
    if is_head and len(chosen) > 1 and chosen[-2] is chain[-2] and not restored:
        weight = layers[chosen[-1]]
        weight.set_(weight.value * head_scale)
    now_set = dict.fromkeys([*(layers[m].block.name for m in chosen), *composed_set])
    replaced = [s for s in signs if s.name in now_set and not restored]
    if replaced:
        notes.insert(0, f"replaced weights that look trained, and what they had learned is lost: {told(replaced)}")
    text = "; ".join([*notes, *filter(None, [_told(weights).removeprefix("; ")])])
    if text and now_set:
        text += f"; set: {some(now_set)}"
    if text:
        warnings.warn(f"isometric_: {text}", GramianWarning, stacklevel=2)
    return model


def _leave_what_needs_none(
    model: nn.Module,
    chain: Collection[nn.Module],
    order: Collection[nn.Module],
    weights: Weights,
    sample: Any,
    objective: Objective,
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Leaves the layers whose scale a norm undoes, and those that a skip goes around, as the forward pass shows.

    Not those that change the sample's mean square by a factor outside `HEALTHY`. Returns the layers in residual
    branches that are left, and of the chain the last of each branch.
    """
    layers = weights.by_layer
    device = next(model.parameters()).device
    flow = trace(model, layers.keys() | weights.others, sample, objective)
    ends = flow.ends()
    matrices = layers.keys() | weights.others - weights.depthwise
    # A module that holds a table of positions and calls layers (a ViT's embeddings) is no step after them.
    matrices = {m for m in matrices if not any(k in flow.gains for k in m.modules() if k is not m)}
    free = normalized(model, matrices, ends, sample, objective, torch.Generator(device).manual_seed(0))
    around = flow.bypassed(free)
    leave_composed(weights, order, around)
    for layer in chain:
        uses = [m for m, weight in layers.items() if weight is layers[layer] and m in flow.gains]
        for reason, kept in ((NORMALIZED, free), (BYPASSED, around)):
            low, high = HEALTHY[reason]
            if uses and all(m in kept and all(low <= gain <= high for gain in flow.gains[m]) for m in uses):
                weights.leave(reason, layers[layer].block.name)
                break
    return [m for m in flow.made.values() if m in around], [m for m in chain if m in ends & around]


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
        if not names:
            continue
        text += f"; {reason}: {some(names, MOST_NAMES)}"
    return text


def _first_uses(order: list[nn.Module], layers: Mapping[nn.Module, Weight]) -> list[nn.Module]:
    """The layers in the order of their first use; of several with one tied weight, the first."""
    first: dict[Weight, nn.Module] = {}
    for m in order:
        if m in layers:
            first.setdefault(layers[m], m)
    return list(first.values())


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

    with hooked([layer, after], note), measuring(model), torch.no_grad():
        objective.predict(model, sample)
    return differ.get(layer, False) and not differ.get(after, True)


def _followed_by(order: list[nn.Module], weights: Weights) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Each layer, at its first use, with the activation module that runs between it and the next layer, if any."""
    for i, module in enumerate(order):
        if module not in weights.by_layer or module in order[:i]:
            continue
        activation = None
        for later in order[i + 1 :]:
            if later in weights.by_layer or later in weights.composed:
                break
            if type(later).__module__ == "torch.nn.modules.activation" and not isinstance(later, _NOT_ELEMENTWISE):
                activation = later
                break
        yield module, activation


def _registered(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in the order in which they are registered, one that is shared at each place."""
    yield module
    for child in module.children() if not isinstance(module, nn.Sequential) else module:
        yield from _registered(child)


def _forward_order(model: nn.Module, weights: Weights, sample: Any, objective: Objective) -> list[nn.Module]:
    """The leaf modules in the order in which a forward pass calls them, an activation that is shared at every call."""
    order: list[nn.Module] = []
    whole = weights.by_layer.keys() | weights.composed.keys()  # a parametrized layer has children, and an attention
    leaves = [m for m in model.modules() if m in whole or not list(m.children())]
    with hooked(leaves, lambda m, x, y: order.append(m)), measuring(model), torch.no_grad():
        objective.predict(model, sample)
    return order
