"""Flow: which outputs of which layers become one unit of another layer's input, found by setting them to zero.

A unit can be removed where nothing else in the network sees it: the hidden unit of an MLP (a row of one matrix and a
column of the next), an attention head (rows of Q, K and V, columns of O), a channel between two convolutions, with what
a norm between them holds. No class is asked for this: a layer's outputs are set to zero by groups, and what changes is
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gramian.block import Block
from gramian.compression.layers.modules import clean_module_name
from gramian.compression.units.zeroed_runs import Watch, channel_dim, is_elementwise
from gramian.layers import layout_of
from gramian.recording import evaluating

__all__ = ["Part", "Units", "find_units"]

BEFORE = 12
"""Layers before a consumer that are tried as producers."""
PROBES = 8
"""Outputs of a producer that are tried beside its largest: what comes after may be off."""
FUSED = 4
"""The most matrices that are looked for in one, as the four gates of an LSTM."""


@dataclass(frozen=True)
class Part:
    """Outputs of a layer that belong to units.

    Args:
        name: of the layer.
        outputs: the number of each output in the order of the units: with `u` units, the first `len / u` are the first
            unit's.
    """

    name: str
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Units:
    """Units that can be removed without a trace elsewhere.

    Args:
        name: of the consumer: its columns, in `num` parts of equal length, are the units.
        num: of units.
        parts: what produces them, and norms on the way.
    """

    name: str
    num: int
    parts: tuple[Part, ...]


def find_units(
    model: nn.Module, consumers: Collection[str], blocks: Mapping[str, Block], call: Callable[[nn.Module], Tensor]
) -> tuple[list[Units], dict[str, str]]:
    """The units of each layer whose inputs come from other layers alone; and why the other layers have none.

    Args:
        model: in evaluation mode when it is called.
        consumers: names of layers whose columns may be removed.
        blocks: of the layers whose rows may be removed, by the name of the layer.
        call: runs the model on a batch and gives its output.

    Cost: up to some dozens of forward passes for each consumer.
    """
    layers = {clean_module_name(name): module for name, module in model.named_modules()}
    watch = Watch(layers, call)
    with evaluating(model), torch.no_grad():
        watch.record()
        found: list[Units] = []
        reasons: dict[str, str] = {}
        for name in [name for name in watch.order if name in consumers]:
            units = _units_of(name, blocks, watch)
            if isinstance(units, str):
                reasons[name] = units
            else:
                found.append(units)
    reasons |= {name: _not_watched(name, layers) for name in consumers if name not in watch.order}
    return found, reasons


def _not_watched(name: str, layers: Mapping[str, nn.Module]) -> str:
    """Why a layer was not seen to run once."""
    outer = name
    while outer:  # a factor lies deeper
        outer = outer.rpartition(".")[0]
        if isinstance(layers[outer], nn.RNNBase):
            return "a recurrent module uses it whole; its units are not narrowed yet"
    return "not run, or run several times"


def _units_of(name: str, blocks: Mapping[str, Block], watch: Watch) -> Units | str:
    n = watch.inputs[name].shape[channel_dim(watch.layers[name], inputs=True)]
    at = watch.order.index(name)
    parts: list[tuple[Part, int]] = []
    for producer in reversed(watch.order[max(0, at - BEFORE) : at]):
        for outputs in _fused(producer, blocks, watch, n):
            num = _granularity(name, producer, outputs, watch)
            if num:
                parts.append((Part(producer, tuple(outputs.tolist())), num))
    if not any(part.name in blocks for part, _ in parts):
        return _why_none(name, blocks, watch)
    num = min(num for _, num in parts)
    if any(one % num for _, one in parts) or num < 2:
        return "the layers before it have units of sizes that do not go together"
    return Units(name, num, tuple(part for part, _ in reversed(parts)))


def _why_none(name: str, blocks: Mapping[str, Block], watch: Watch) -> str:
    """Why nothing that produces a layer's inputs can lose units."""
    own = watch.inputs[name]
    for known, why in ((watch.given, "the model's own"), (watch.recurrent, "a recurrent module's, which stays whole")):
        if any(x.numel() == own.numel() and torch.equal(x.flatten().to(own), own.flatten()) for x in known):
            return f"its inputs are {why}"
    whole = next(
        (n for n in reversed(watch.order[: watch.order.index(name)]) if not is_elementwise(watch.layers[n])), ""
    )
    if whole and whole not in blocks and watch.reaches(name, whole):
        return f"its inputs come from {whole}, which stays whole"
    before = [one for one in watch.order[: watch.order.index(name)] if one in blocks]
    if not watch.reaches(name, *before):
        return "its inputs come from no layer that can be narrowed, as from a table or a recurrent module"
    norm = _mixing(name, before, watch)
    if norm:
        kind = type(watch.layers[norm]).__name__
        return f"{norm} ({kind}) before it normalizes all its inputs together, so that none goes without a trace"
    return "its inputs reach other layers too, or mix before they reach it"


def _mixing(name: str, before: Sequence[str], watch: Watch) -> str:
    """A norm between a layer and the one that produces its inputs, which makes all channels depend on each."""
    at = watch.order.index(name)
    for producer in reversed(before[-BEFORE:]):
        zero = {producer: torch.tensor(_probes(producer, watch.all_of(producer), watch)[:1])}
        into = watch.run(zero, until=name)
        if into is None or not bool(watch.changed(name, into).any()):
            continue
        for norm in watch.order[watch.order.index(producer) + 1 : at]:
            layer = watch.layers[norm]
            given = watch.run(zero, until=norm) if is_elementwise(layer) else None
            if given is not None and int(watch.changed(norm, given).sum()) == 1 and watch.mixes(norm, given):
                return norm
        return ""
    return ""


def _fused(name: str, blocks: Mapping[str, Block], watch: Watch, n: int) -> list[Tensor]:
    """The outputs of a layer, of each fused part by itself, where their number goes with the consumer's inputs."""
    layer, block = watch.layers[name], blocks.get(name)
    rows = 0 if block is None else block.shape[-2]
    m = watch.outputs[name].shape[channel_dim(layer, inputs=False)]
    whole = torch.arange(m)
    if is_elementwise(layer):
        return [whole] if n % m == 0 and all(len(p) == m for p in layer.parameters(recurse=False)) else []
    if block is None or block.layout.rows:
        return []
    if len(block.shape) == 2 and m > n and m % n == 0 and m <= FUSED * n:  # fused, though no table names it
        return list(whole.view(-1, n))
    if len(block.shape) == 2:
        return [whole] if n % m == 0 else []
    if len(block.shape) > 3 or getattr(layer, "groups", 1) > 1 or n % rows:
        return []
    plain = layout_of(layer)
    assert plain is not None
    return list(block.split(plain.join(whole[:, None].expand(plain.matrices)))[..., 0])


def _granularity(consumer: str, producer: str, outputs: Tensor, watch: Watch) -> int:
    """Into how many units a producer's outputs fall, the most there can be; 0 where it is none."""
    m = len(outputs)
    if not watch.reaches(consumer, producer):
        return 0
    for probe in _probes(producer, outputs, watch):
        into = watch.run({producer: outputs[probe : probe + 1]}, until=consumer)
        if into is None:
            return 0
        at = watch.changed(consumer, into).nonzero().flatten()
        if len(at):
            break
    else:
        return 0
    n = watch.inputs[consumer].shape[channel_dim(watch.layers[consumer], inputs=True)]
    first, last = int(at.min()), int(at.max())
    num = max(
        (d for d in range(1, m + 1) if m % d == n % d == 0 and first * d // n == last * d // n == probe * d // m),
        default=0,
    )
    if num < 2:
        return 0
    gone = torch.randperm(num, generator=torch.Generator().manual_seed(0))[: num // 2]
    zero = {producer: outputs.view(num, -1)[gone].flatten()}
    into = watch.run(zero, until=consumer)
    if into is None:
        return 0
    others = watch.changed(consumer, into).view(num, -1).index_fill(0, gone, False)
    return num if not bool(others.any()) and watch.only_through(consumer, zero) else 0


def _probes(producer: str, outputs: Tensor, watch: Watch) -> list[int]:
    """The outputs that are largest, of either sign: a unit that is never on, as before a ReLU, tells nothing."""
    dim = channel_dim(watch.layers[producer], inputs=False)
    values = watch.outputs[producer].movedim(dim, 0).flatten(1)[outputs.to(watch.outputs[producer].device)]
    largest = (int(values.amax(1).argmax()), int(values.amin(1).argmin()))
    return list(dict.fromkeys((*largest, *torch.linspace(0, len(outputs) - 1, PROBES).long().tolist())))
