"""Faults of parameters: their scale, rank and values."""

from __future__ import annotations

import math

import torch

from gramian.bench.faults.architectures import Options
from gramian.bench.faults.kinds.table import Planted, bias_of, chain, embedding, inner, kind, matrices
from gramian.bench.faults.setup import Draw, Setup

EVERYWHERE = ("all layers",)

# Small networks overcome one bad layer within a hundred steps, and only lose the time; the check of harm looks early.
EARLY = 30
ADAM = Options(optimizer="adam")


def _scale_one(setup: Setup, draw: Draw, factor: float) -> Planted:
    found = chain(setup.model)
    name = draw.choice(list(found))
    found[name].data.mul_(factor)
    bias = bias_of(setup.model, name)
    if bias is not None:
        bias.data.zero_()
    extra = ("embedding-scale",) if name in embedding(setup.model) else ()
    return Planted((name,), f"× {factor:.3g}", extra)


@kind(
    "layer-gain-small",
    "parameter-scale-small gain-below-one",
    consequences="gradient-vanishes",
    options=ADAM,
    steps=EARLY,
)
def layer_gain_small(setup: Setup, draw: Draw) -> Planted:
    """One layer's weights are far too small."""
    return _scale_one(setup, draw, draw.power(-5.5, -3.5))


@kind(
    "layer-gain-large",
    "parameter-scale-large gain-above-one",
    consequences="gradient-explodes saturated-units attention-saturated gate-shut rate-too-high",
)
def layer_gain_large(setup: Setup, draw: Draw) -> Planted:
    """One layer's weights are far too large."""
    return _scale_one(setup, draw, draw.power(1.7, 3.0))


def _scale_all(setup: Setup, factor: float) -> Planted:
    for w in inner(setup.model).values():
        w.data.mul_(factor)
    return Planted(EVERYWHERE, f"× {factor:.3g} each")


@kind(
    "all-gains-small",
    "gain-below-one parameter-scale-small",
    consequences="gradient-vanishes gate-shut norm-zero-gain",
    options=Options(depth=6),
)
def all_gains_small(setup: Setup, draw: Draw) -> Planted:
    """All layers' weights are too small, as by a wrong fan."""
    return _scale_all(setup, draw.uniform(0.05, 0.3))


@kind(
    "all-gains-large",
    "gain-above-one parameter-scale-large",
    consequences="gradient-explodes saturated-units attention-saturated residual-growth rate-too-high",
)
def all_gains_large(setup: Setup, draw: Draw) -> Planted:
    """All layers' weights are too large, as by a wrong fan."""
    return _scale_all(setup, draw.uniform(3, 8))


@kind(
    "randn-weights",
    "gain-above-one parameter-scale-large",
    consequences="gradient-explodes saturated-units attention-saturated residual-growth head-scale rate-too-high",
)
def randn_weights(setup: Setup, draw: Draw) -> Planted:
    """All weights are drawn with unit variance, whatever their fan."""
    for w in matrices(setup.model).values():
        w.data.copy_(draw.normal(*w.shape))
    return Planted(EVERYWHERE, "variance 1")


@kind(
    "constant-layer", "parameter-constant", consequences="parameter-rank-one gain-below-one", options=ADAM, steps=EARLY
)
def constant_layer(setup: Setup, draw: Draw) -> Planted:
    """All entries of one layer's weight are equal."""
    found = chain(setup.model)
    name = draw.choice(list(found))
    value = draw.uniform(0.3, 1.0) / math.sqrt(found[name][0].numel())
    found[name].data.fill_(value)
    return Planted((name,), f"{value:.3g}")


@kind(
    "constant-layers",
    "parameter-constant",
    consequences="parameter-rank-one gain-below-one gain-above-one gradient-vanishes gradient-explodes dead-units",
)
def constant_layers(setup: Setup, draw: Draw) -> Planted:
    """All entries of each weight in the blocks are equal."""
    value = draw.power(-2.5, -1)
    for w in inner(setup.model).values():
        w.data.fill_(value)
    return Planted((*EVERYWHERE, *inner(setup.model)), f"{value:.3g}")


def _zero(setup: Setup, names: list[str], draw: Draw) -> Planted:
    name = draw.choice(names)
    {**embedding(setup.model), **matrices(setup.model)}[name].data.zero_()
    bias = bias_of(setup.model, name)
    if bias is not None:
        bias.data.zero_()
    return Planted((name,))


ZERO_MAKES = "gradient-vanishes gain-below-one dead-units parameter-constant input-constant parameter-scale-small"


@kind("zero-stem", "parameter-zero", consequences=ZERO_MAKES, options=Options(act="relu"))
def zero_stem(setup: Setup, draw: Draw) -> Planted:
    """The first layer's weight and bias are zero."""
    return _zero(setup, [name for name in chain(setup.model) if name.startswith("stem.")], draw)


@kind("zero-layer", "parameter-zero", consequences=ZERO_MAKES, options=Options(act="relu"))
def zero_layer(setup: Setup, draw: Draw) -> Planted:
    """The weight and bias of a layer inside are zero."""
    return _zero(setup, list(inner(setup.model)), draw)


@kind("rank-one-layer", "parameter-rank-one", consequences="gain-below-one gain-above-one parameter-scale-small",
      options=ADAM, steps=EARLY)  # fmt: skip
def rank_one_layer(setup: Setup, draw: Draw) -> Planted:
    """One layer's weight is an outer product of the usual norm."""
    found = {name: w for name, w in chain(setup.model).items() if w.flatten(1).shape[1] > 4}
    name = draw.choice(list(found) or list(chain(setup.model)))
    w = chain(setup.model)[name]
    flat = w.data.flatten(1)
    outer = torch.outer(draw.normal(flat.shape[0]), draw.normal(flat.shape[1]))
    w.data.copy_((outer * flat.norm() / outer.norm()).view_as(w))
    return Planted((name,))


@kind(
    "nan-parameter",
    "parameter-non-finite",
    consequences="loss-non-finite gradient-explodes gradient-overflow",
)
def nan_parameter(setup: Setup, draw: Draw) -> Planted:
    """One entry of a parameter is NaN or infinite."""
    name = draw.choice([name for name, _ in setup.model.named_parameters()])
    value = draw.choice((math.nan, math.nan, math.inf))
    w = setup.model.get_parameter(name).data.view(-1)
    w[int(draw.uniform(0, w.numel()))] = value
    return Planted((name,), str(value))
