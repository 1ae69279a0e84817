"""Faults of wiring: what is cut from the graph, frozen, never called, or shared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gramian.bench.faults.architectures import Options, make_optimizer
from gramian.bench.faults.kinds.table import Planted, kind, matrices, network
from gramian.bench.faults.setup import Draw, Setup
from gramian.objective import Objective


@kind("graph-cut", "graph-cut", consequences="parameter-unused parameter-not-stepped gradient-vanishes")
def graph_cut(setup: Setup, draw: Draw) -> Planted:
    """A tensor leaves the graph on its way through the blocks, so that nothing before it learns."""
    model = network(setup)
    model.detached = len(model.blocks) - 1 - draw.choice((0, 0, 1)) * (len(model.blocks) > 2)
    after = f"blocks.{model.detached + 1}" if model.detached + 1 < len(model.blocks) else "head"
    return Planted((f"blocks.{model.detached}", after), f"after blocks.{model.detached}")


@kind("frozen-layers", "parameter-frozen", consequences="graph-cut parameter-not-stepped gradient-vanishes")
def frozen_layers(setup: Setup, draw: Draw) -> Planted:
    """Untrained layers do not require gradients."""
    model, keep = network(setup), draw.choice(("head", "head", "norms"))
    places = []
    for name, parameter in model.named_parameters():
        norm = keep == "norms" and "norm" in name
        if not name.startswith("head") and not norm:
            parameter.requires_grad_(False)
            places.append(name)
    return Planted((*places, "stem", "blocks"), f"all but {keep}")


@kind("block-not-called", "parameter-unused", consequences="graph-cut gradient-vanishes parameter-not-stepped")
def block_not_called(setup: Setup, draw: Draw) -> Planted:
    """Forward leaves out the blocks, whose parameters are never used."""
    model = network(setup)
    model.uncalled = frozenset(range(len(model.blocks)))
    return Planted(("blocks", *(f"blocks.{i}" for i in range(len(model.blocks)))), "all blocks")


@kind("layer-shared", "parameter-shared", needs="stackable", options=Options(depth=12))
def layer_shared(setup: Setup, draw: Draw) -> Planted:
    """All blocks are one object, as by `[Block()] * depth`."""
    model = network(setup)
    lr, name = setup.optimizer.param_groups[0]["lr"], type(setup.optimizer).__name__
    model.blocks = nn.ModuleList([model.blocks[0]] * len(model.blocks))
    setup.optimizer = make_optimizer(setup, "adam" if name == "AdamW" else "sgd", lr)
    places = [f"blocks.{i}" for i in range(len(model.blocks))]
    return Planted((*places, "blocks", "all layers"), f"{len(places)} blocks")


def _half(setup: Setup, scale: float) -> None:
    """Train under float16 autocast, with the loss multiplied by `scale`."""

    def predict(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return model(batch[0])

    usual = Objective.classification()

    def criterion(output: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | int]:
        total, units = usual.criterion(output.float(), batch)
        return total * scale, units

    setup.objective = Objective(predict, criterion)


HALF = Options(plain=False, optimizer="sgd")
NO_LSTM = ("mlp", "bn-mlp", "cnn", "resnet", "transformer", "vit", "depthwise")


@kind(
    "float16-underflow",
    "gradient-underflow",
    consequences="gradient-vanishes rate-too-high",
    only=NO_LSTM,
    options=HALF,
)
def float16_underflow(setup: Setup, draw: Draw) -> Planted:
    """Gradients in float16 are below its range: the loss is scaled down, and the rate up to match."""
    scale = draw.power(-7, -5.5)
    _half(setup, scale)
    for group in setup.optimizer.param_groups:
        group["lr"] /= scale
    return Planted(("all layers", "loss", *matrices(setup.model)), f"loss × {scale:.2g}")


@kind(
    "float16-overflow",
    "gradient-overflow",
    consequences="gradient-explodes loss-non-finite rate-too-low",
    only=NO_LSTM,
    options=HALF,
)
def float16_overflow(setup: Setup, draw: Draw) -> Planted:
    """Gradients in float16 are beyond its range: the loss is scaled up without a check for infinities."""
    scale = draw.power(7.5, 9)
    _half(setup, scale)
    for group in setup.optimizer.param_groups:
        group["lr"] /= scale
    return Planted(("all layers", "loss", *matrices(setup.model)), f"loss × {scale:.2g}")
