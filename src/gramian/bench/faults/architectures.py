"""The eight architectures: a seed gives a healthy training run; options make it deeper or plainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.bench.faults import data as sets
from gramian.bench.faults import networks as nets
from gramian.bench.faults.setup import Draw, Setup
from gramian.objective import Objective

__all__ = ["ARCHITECTURES", "STEPS", "Options", "healthy"]

STEPS = 80
"""Steps of a training check."""

BATCH_SIZE = 64


@dataclass(frozen=True)
class Options:
    """What a kind of fault fixes in the faulty run and in its twin alike.

    Args:
        act: the activation, by name; drawn where it is empty.
        depth: number of blocks; drawn where it is 0.
        norm: whether there are norms, in those architectures that have them.
        optimizer: "adam" or "sgd"; drawn where it is empty.
        tokens: whether an LSTM reads tokens; drawn where it is `None`.
        plain: whether the objective is a plain function; drawn where it is `None`.
    """

    act: str = ""
    depth: int = 0
    norm: bool = True
    optimizer: str = ""
    tokens: bool | None = None
    plain: bool | None = None


@dataclass(frozen=True)
class Architecture:
    """How its networks and data are made, and the rates at which they learn.

    Args:
        make: `(draw, options) -> (network, data)`.
        adam, sgd: healthy rates.
        acts: the activations that are drawn.
        traits: what a fault may ask for: "batch-norm", "norm", "acts" (an activation between any two layers),
            "plain" (no skips), "pixels" (inputs that are numbers), "attention", "residual", "sgd" (whether that
            optimizer may be drawn).
    """

    make: Callable[[Draw, Options], tuple[nets.Network, sets.Data]]
    adam: float
    sgd: float
    traits: frozenset[str] = field(default_factory=frozenset)


def _act(draw: Draw, options: Options, *of: str) -> str:
    drawn = draw.choice(of)
    return options.act or drawn


def _depth(draw: Draw, options: Options, *of: int) -> int:
    drawn = draw.choice(of)
    return options.depth or drawn


def _initialize(model: nn.Module, act: str) -> None:
    """He or Xavier initialization, so that signals keep their size through plain layers."""
    gain = nn.init.calculate_gain("tanh" if act == "tanh" else "relu") if act != "sigmoid" else 1.0
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan = module.weight[0].numel()
            nn.init.normal_(module.weight, std=gain / fan**0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _head(model: nets.Network) -> nets.Network:
    nn.init.normal_(model.head.weight, std=model.head.in_features**-0.5)
    return model


def _mlp(draw: Draw, options: Options, norm: bool = False) -> tuple[nets.Network, sets.Data]:
    act = _act(draw, options, "relu", "tanh", "gelu") if not norm else _act(draw, options, "relu", "gelu")
    depth, width, dropout = _depth(draw, options, 3, 4, 5), draw.choice((48, 64)), draw.choice((0.0, 0.05))
    data = sets.flat(sets.digit_images(draw)) if norm else sets.clusters(draw)
    stem = nets.Dense(data.x.shape[1], width, act, norm, 0.0)
    blocks: list[nn.Module] = [nets.Dense(width, width, act, norm, dropout) for _ in range(depth)]
    model = nets.Network(stem, blocks, nets.Pool(nets.itself), nn.Linear(width, sets.CLASSES))
    _initialize(model, act)
    return _head(model), data


def _bn_mlp(draw: Draw, options: Options) -> tuple[nets.Network, sets.Data]:
    return _mlp(draw, options, norm=options.norm)


def _cnn(draw: Draw, options: Options) -> tuple[nets.Network, sets.Data]:
    act = _act(draw, options, "relu", "gelu", "tanh")
    depth, width = _depth(draw, options, 3, 4), draw.choice((16, 20))
    stem = nets.Conv(1, width, act, False, 0.0, stride=2)
    blocks: list[nn.Module] = [nets.Conv(width, width, act, False, 0.0) for _ in range(depth)]
    head = nn.Linear(width * 25, sets.CLASSES)
    model = nets.Network(stem, blocks, nn.Flatten(), head)
    _initialize(model, act)
    return _head(model), sets.digit_images(draw)


def _resnet(draw: Draw, options: Options) -> tuple[nets.Network, sets.Data]:
    depth, width = _depth(draw, options, 2, 3), draw.choice((12, 16))
    stem = nets.Conv(1, width, "relu", options.norm, 0.0, stride=2)
    blocks: list[nn.Module] = [nets.Residual(width, "relu", options.norm, 0.0) for _ in range(depth)]
    model = nets.Network(stem, blocks, nn.Flatten(), nn.Linear(25 * width, sets.CLASSES))
    _initialize(model, "relu")
    zero_gain = draw.choice((False, True))  # as many public residual networks begin
    for block in blocks:
        if options.norm and zero_gain:
            nn.init.zeros_(block.norm2.weight)  # type: ignore[union-attr]
        if not options.norm:
            nn.init.normal_(block.conv2.weight, std=0.3 / (depth * 9 * width) ** 0.5)  # type: ignore[union-attr]
    return _head(model), sets.digit_images(draw)


def _depthwise(draw: Draw, options: Options) -> tuple[nets.Network, sets.Data]:
    act, depth, width = _act(draw, options, "relu", "gelu"), _depth(draw, options, 2, 3), draw.choice((16, 24))
    stem = nets.Conv(1, width, act, True, 0.0, stride=2)
    blocks: list[nn.Module] = [nets.Separable(width, act, 0.0) for _ in range(depth)]
    model = nets.Network(stem, blocks, nn.Flatten(), nn.Linear(25 * width, sets.CLASSES))
    _initialize(model, "relu")
    return _head(model), sets.digit_images(draw)


def _lstm(draw: Draw, options: Options) -> tuple[nets.Network, sets.Data]:
    drawn, width = draw.choice((False, True)), draw.choice((32, 40))
    tokens = drawn if options.tokens is None else options.tokens
    depth = _depth(draw, options, 1, 2)
    data = sets.chains(draw, 12) if tokens else sets.digit_rows(draw)
    stem = nets.Tokens(sets.VOCABULARY, width) if tokens else nets.Dense(8, width, "tanh", False, 0.0)
    blocks: list[nn.Module] = [nets.Recurrent(width, width, 0.0) for _ in range(depth)]
    for block in blocks:
        nn.init.ones_(block.lstm.bias_ih_l0[width : 2 * width])  # type: ignore[union-attr]
    pool = nets.Pool(nets.over_tokens if tokens else nets.last_step)
    return nets.Network(stem, blocks, pool, nn.Linear(width, 4 if tokens else sets.CLASSES)), data


def _transformer(draw: Draw, options: Options) -> tuple[nets.Network, sets.Data]:
    causal, width, depth = draw.choice((False, True)), draw.choice((24, 32)), _depth(draw, options, 2, 2)
    data = sets.echoes(draw) if causal else sets.chains(draw)
    stem = nets.Tokens(sets.VOCABULARY, width, 16)
    nn.init.normal_(stem.tokens.weight, std=0.5)
    blocks: list[nn.Module] = [
        nets.Transforming(width, nets.Attention(width, 2, causal), options.norm, 0.0) for _ in range(depth)
    ]
    pool = nets.Pool(nets.itself if causal else nets.over_tokens, nn.LayerNorm(width) if options.norm else None)
    model = nets.Network(stem, blocks, pool, nn.Linear(width, sets.VOCABULARY if causal else 4))
    _quiet_branches(model, options)
    return model, data


def _vit(draw: Draw, options: Options) -> tuple[nets.Network, sets.Data]:
    width, depth = draw.choice((24, 32)), _depth(draw, options, 2, 2)
    blocks: list[nn.Module] = [nets.Transforming(width, nets.Packed(width, 2), options.norm, 0.0) for _ in range(depth)]
    pool = nets.Pool(nets.over_tokens, nn.LayerNorm(width) if options.norm else None)
    model = nets.Network(nets.Patches(width), blocks, pool, nn.Linear(width, sets.CLASSES))
    _quiet_branches(model, options)
    return model, sets.digit_patches(draw)


def _quiet_branches(model: nets.Network, options: Options) -> None:
    """Without norms, the branches must begin small."""
    if not options.norm:
        for name, parameter in model.blocks.named_parameters():
            if name.endswith(("out.weight", "out_proj.weight", "down.weight")):
                parameter.data.mul_(0.3)


def _traits(*names: str) -> frozenset[str]:
    return frozenset(names)


ARCHITECTURES: dict[str, Architecture] = {
    "mlp": Architecture(_mlp, 3e-3, 0.03, _traits("sgd", "plain", "acts", "pixels", "stackable")),
    "bn-mlp": Architecture(
        _bn_mlp, 3e-3, 0.05, _traits("sgd", "plain", "acts", "pixels", "batch-norm", "norm", "stackable")
    ),
    "cnn": Architecture(_cnn, 3e-3, 0.02, _traits("sgd", "plain", "acts", "pixels", "stackable")),
    "resnet": Architecture(_resnet, 3e-3, 0.03, _traits("sgd", "pixels", "batch-norm", "norm", "residual")),
    "lstm": Architecture(_lstm, 1e-2, 1.0, _traits("recurrent", "pixels")),
    "transformer": Architecture(_transformer, 5e-3, 0.3, _traits("norm", "attention", "residual")),
    "vit": Architecture(_vit, 4e-3, 0.1, _traits("norm", "attention", "residual", "pixels")),
    "depthwise": Architecture(_depthwise, 3e-3, 0.05, _traits("sgd", "plain", "acts", "pixels", "batch-norm", "norm")),
}
"""Name on the command line: the architecture."""


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy, as written by hand."""
    scores = model(batch[0])
    return F.cross_entropy(scores.flatten(0, -2), batch[1].flatten())


def make_optimizer(setup: Setup, name: str, lr: float) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay, or SGD with momentum 0.9, on all parameters."""
    if name == "adam":
        return torch.optim.AdamW(setup.model.parameters(), lr=lr, weight_decay=0.01)
    return torch.optim.SGD(setup.model.parameters(), lr=lr, momentum=0.9)


def healthy(architecture: str, seed: int, options: Options | None = None) -> Setup:
    """The healthy run of a seed."""
    options = options or Options()
    made = ARCHITECTURES[architecture]
    draw = Draw(f"healthy/{architecture}/{seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw.seed)
        model, data = made.make(draw, options)
    drawn = draw.choice(("adam", "adam", "sgd") if "sgd" in made.traits else ("adam",))
    optimizer = options.optimizer or drawn
    plain = draw.uniform(0, 1) < 0.25
    batches = sets.onto_batches(data.x, data.y, BATCH_SIZE)
    usual = Objective.classification()
    setup = Setup(
        model=model,
        batches=batches,
        objective=mean_loss if (plain if options.plain is None else options.plain) else usual,
        optimizer=torch.optim.SGD([torch.zeros(())]),
        held_out=[(data.x_held_out, data.y_held_out)],
        seed=draw.seed,
    )
    setup.optimizer = make_optimizer(setup, optimizer, made.adam if optimizer == "adam" else made.sgd)
    return setup
