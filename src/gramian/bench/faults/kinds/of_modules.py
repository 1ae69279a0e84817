"""Faults of modules: activations, norms, dropout, attention, gates, embeddings, heads, residual branches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gramian.bench.faults import networks as nets
from gramian.bench.faults.architectures import Options
from gramian.bench.faults.kinds.table import Planted, bias_of, embedding, inner, kind, matrices, modules_of, network
from gramian.bench.faults.setup import Draw, Setup

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@kind(
    "deep-sigmoid",
    "gain-below-one saturated-units gradient-vanishes",
    only=("mlp", "bn-mlp", "cnn", "depthwise"),
    options=Options(depth=7),
)
def deep_sigmoid(setup: Setup, draw: Draw) -> Planted:
    """Sigmoids between the layers of a deep network."""
    places = []
    for name, module in list(setup.model.named_modules()):
        if isinstance(module, tuple(nets.ACTIVATIONS.values())):
            owner, _, attribute = name.rpartition(".")
            setattr(setup.model.get_submodule(owner), attribute, nn.Sigmoid())
            places.append(name)
    return Planted(("all layers", *places))


@kind("wrong-init-for-depth", "gain-below-one gradient-vanishes", consequences="parameter-scale-small",
      only=("mlp", "cnn"),
      options=Options(act="relu", depth=12))  # fmt: skip
def wrong_init_for_depth(setup: Setup, draw: Draw) -> Planted:
    """A deep plain ReLU network keeps PyTorch's default initialization, whose gain is 0.41."""
    for w in inner(setup.model).values():
        w.data.uniform_(-1, 1, generator=draw.generator).mul_(w[0].numel() ** -0.5)
    return Planted(("all layers",))


def _some_layer(setup: Setup, draw: Draw, pointwise: bool = True) -> tuple[str, str]:
    """The weight of a layer that an activation follows, and the activation's name."""
    found = []
    for name in [n for n in matrices(setup.model) if n.startswith(("stem.", "blocks."))]:
        owner = name.split(".")[:-2]
        layer = name.split(".")[-2]
        act = {"pointwise": "act2", "depthwise": "act1"}.get(layer, "act")
        found.append((name, ".".join([*owner, act])))
    return draw.choice(found)


@kind(
    "dead-relu",
    "dead-units",
    consequences="gradient-vanishes gain-below-one",
    only=("mlp", "bn-mlp", "cnn", "depthwise"),
    options=Options(act="relu"),
)
def dead_relu(setup: Setup, draw: Draw) -> Planted:
    """A negative bias keeps (nearly) all ReLUs of a layer at zero."""
    weight, act = _some_layer(setup, draw)
    bias, shift = bias_of(setup.model, weight), draw.uniform(8, 40)
    owner, _, layer = weight.rpartition(".")[0].rpartition(".")
    place = weight.rpartition(".")[0]
    if bias is None:
        norm = {"depthwise": "norm1", "pointwise": "norm2"}.get(layer, "norm")
        place = f"{owner}.{norm}"
        bias = setup.model.get_submodule(place).bias
    assert isinstance(bias, torch.Tensor)
    bias.data.fill_(-shift)
    return Planted((f"{place}.bias", act, weight), f"bias −{shift:.3g}")


@kind(
    "saturated-units",
    "saturated-units",
    consequences="gradient-vanishes gain-below-one parameter-scale-large gain-above-one",
    only=("mlp", "cnn"),
    options=Options(act="tanh"),
)
def saturated_units(setup: Setup, draw: Draw) -> Planted:
    """The tanh units of one layer are driven far into their flat ends."""
    weight, act = _some_layer(setup, draw)
    if draw.uniform(0, 1) < 0.5:
        factor = draw.power(2, 3)
        setup.model.get_parameter(weight).data.mul_(factor)
        return Planted((weight, act), f"weight × {factor:.3g}", ("parameter-scale-large",))
    shift = draw.uniform(8, 30)
    bias = bias_of(setup.model, weight)
    assert bias is not None
    bias.data.copy_(shift * draw.normal(len(bias)).sign())
    return Planted((weight, act, f"{weight.rpartition('.')[0]}.bias"), f"bias ±{shift:.3g}")


@kind("norm-zero-gain", "norm-zero-gain", consequences="gradient-vanishes gain-below-one dead-units parameter-zero",
      needs="norm")  # fmt: skip
def norm_zero_gain(setup: Setup, draw: Draw) -> Planted:
    """The gains of a norm that no skip goes around are zero."""
    found = {n: m for n, m in modules_of(setup.model, *NORMS).items() if n.startswith(("stem.", "pool."))}
    if not any(isinstance(b, (nets.Residual, nets.Transforming)) for b in network(setup).blocks):
        found = modules_of(setup.model, *NORMS)
    name = draw.choice(list(found))
    nn.init.zeros_(found[name].weight)  # type: ignore[arg-type]
    return Planted((name, f"{name}.weight"), causes=("parameter-zero",))


@kind("norm-buffers-lost", "norm-statistics", needs="batch-norm", steps=0, trained=80)
def norm_buffers_lost(setup: Setup, draw: Draw) -> Planted:
    """A trained network's running statistics are those of another network, or fresh."""
    found, how = modules_of(setup.model, *BATCH_NORMS), draw.choice(("fresh", "other"))
    for module in found.values():
        norm: Any = module
        if how == "fresh":
            norm.reset_running_stats()
        else:
            norm.running_mean.add_(draw.uniform(2, 5) * draw.normal(norm.num_features) * norm.running_var.sqrt())
            norm.running_var.mul_(draw.uniform(0.02, 0.1))
    return Planted((*found, "all layers"), how)


@kind("norm-momentum", "norm-statistics", needs="batch-norm")
def norm_momentum(setup: Setup, draw: Draw) -> Planted:
    """Batch norms take the share of old statistics for that of new ones, and hardly move them."""
    found, momentum = modules_of(setup.model, *BATCH_NORMS), draw.choice((0.0, 1e-4, 1e-3))
    for module in found.values():
        norm: Any = module
        norm.momentum = momentum
        norm.running_mean.fill_(draw.uniform(-1, 1))  # of the data that it saw before
        norm.running_var.fill_(draw.power(0.5, 1.5))
    return Planted((*found, "all layers"), f"momentum {momentum}")


@kind("norm-evaluation-mode", "norm-evaluation-mode", needs="batch-norm",
      consequences="norm-statistics gain-below-one gain-above-one gradient-vanishes gradient-explodes residual-growth",
      options=Options(depth=6))  # fmt: skip
def norm_evaluation_mode(setup: Setup, draw: Draw) -> Planted:
    """Batch norms are trained in evaluation mode, with statistics that do not fit."""
    found = modules_of(setup.model, *BATCH_NORMS)
    variance = draw.choice((1.0, draw.power(-1.5, -0.8), draw.power(0.8, 1.5)))
    for module in found.values():
        norm: Any = module
        norm.running_var.fill_(variance)
    if draw.uniform(0, 1) < 0.5:
        setup.model.eval()
    else:
        for module in found.values():
            module.eval()
    return Planted((*found, "all layers"), f"variance {variance:.3g}")


@kind("dropout-high", "dropout-rate", consequences="gradient-vanishes")
def dropout_high(setup: Setup, draw: Draw) -> Planted:
    """Dropout leaves a few percent, as where the probability to keep was meant."""
    rate, found = draw.choice((0.9, 0.95, 0.98)), modules_of(setup.model, nn.Dropout)
    if not found:
        raise AssertionError("every architecture has dropout modules")
    for module in found.values():
        module.p = rate  # type: ignore[assignment]
    return Planted((*found, "all layers"), f"{rate}")


@kind("embedding-scale", "embedding-scale parameter-scale-large", only=("transformer", "lstm"),
      consequences="gate-shut attention-saturated residual-growth saturated-units gain-above-one",
      options=Options(tokens=True), steps=40)  # fmt: skip
def embedding_scale(setup: Setup, draw: Draw) -> Planted:
    """Embeddings are a hundred times too large."""
    found, factor = embedding(setup.model), draw.power(1.7, 2.5)
    for w in found.values():
        w.data.mul_(factor)
    return Planted((*found, "stem"), f"× {factor:.3g}")


@kind("head-scale", "head-scale parameter-scale-large", consequences="gradient-explodes rate-too-high gain-above-one")
def head_scale(setup: Setup, draw: Draw) -> Planted:
    """The head's weight is a hundred times too large."""
    factor = draw.power(1.7, 2.5)
    network(setup).head.weight.data.mul_(factor)  # type: ignore[union-attr]
    return Planted(("head.weight",), f"× {factor:.3g}")


@kind("attention-saturated", "attention-saturated parameter-scale-large", needs="attention",
      consequences="gradient-vanishes gradient-explodes saturated-units")  # fmt: skip
def attention_saturated(setup: Setup, draw: Draw) -> Planted:
    """Queries and keys are so large that attention sees one position."""
    factor, places = draw.power(1.0, 1.8), []
    for name, w in inner(setup.model).items():
        if name.endswith(("query.weight", "key.weight")):
            w.data.mul_(factor)
            places += [name, name.rpartition(".")[0].rpartition(".")[0]]
        elif name.endswith("in_proj_weight"):
            w.data[: 2 * w.shape[1]].mul_(factor)
            places += [name]
    return Planted((*places, "all layers"), f"× {factor:.3g} each")


@kind("residual-growth", "residual-growth gain-above-one", needs="residual",
      consequences="gradient-explodes parameter-scale-large attention-saturated head-scale rate-too-high",
      options=Options(norm=False, depth=6, optimizer="adam"))  # fmt: skip
def residual_growth(setup: Setup, draw: Draw) -> Planted:
    """Residual branches without norms are so strong that the sum grows with every block."""
    factor = draw.uniform(4, 8)
    for name, w in inner(setup.model).items():
        if name.endswith(("conv2.weight", "down.weight", "out.weight", "out_proj.weight", "up.weight")):
            w.data.mul_(factor if "conv2" not in name else 3 * factor)
    return Planted(("all layers", *(f"blocks.{i}" for i in range(len(network(setup).blocks)))), f"× {factor:.3g}")


@kind(
    "gates-shut",
    "gate-shut",
    consequences="gradient-vanishes gain-below-one saturated-units dead-units",
    only=("lstm",),
)
def gates_shut(setup: Setup, draw: Draw) -> Planted:
    """A bias shuts the input, the forget or the output gates of an LSTM."""
    found = modules_of(setup.model, nn.LSTM)
    name = draw.choice(list(found))
    lstm: Any = found[name]
    which, shift = draw.choice(("input", "output", "input and forget")), draw.uniform(15, 30)
    width = lstm.hidden_size
    for gate, at in (("input", 0), ("forget", 1), ("output", 3)):
        if gate in which:
            lstm.bias_ih_l0.data[at * width : (at + 1) * width] -= shift
    return Planted((name, f"{name}.bias_ih_l0"), f"{which} −{shift:.3g}")
