"""Cutting: rows and columns of units leave the layers, and numbers around these, as that of heads, follow."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gramian.checkpoint.faults import first_line
from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.layers.lowrank import matrix_of
from gramian.compression.layers.modules import clean_module_name, copied, submodule
from gramian.compression.storage.slicing import FEATURES, sliced_
from gramian.compression.units.attention_heads import rows_of_heads
from gramian.compression.units.flow import Units
from gramian.compression.units.zeroed_runs import is_elementwise, is_near
from gramian.layers import layer_of, layout_of
from gramian.recording import evaluating

__all__ = ["compensate_", "cut_", "numbers_for"]


def numbers_for(model: nn.Module, units: Units, call: Callable[[nn.Module], Tensor]) -> dict[str, dict[str, int]] | str:
    """Which numbers around the layers go down with the units, as the number of heads; or why they cannot be removed.

    The model without the units has to compute what the model with their outputs at zero does.

    Args:
        model: with all units.
        units: of one layer.
        call: the model's output on a few samples.

    Returns:
        Integer attributes by module; or the reason.
    """
    channels = _channels(submodule(model, units.name))
    outputs = {sum(len(p.outputs) for p in units.parts if p.name == part.name) for part in units.parts}
    wrong = ""
    for sizes in (set(), {units.num}, {channels}, {units.num, channels, *outputs}):
        numbers = _numbers(model, units, sizes)
        if sizes and not numbers:
            continue
        wrong = next(
            filter(None, (_wrong(model, units, numbers, n, call) for n in {units.num // 2, units.num - 1})), ""
        )
        if not wrong:
            return numbers
    return (
        f"with fewer inputs of this layer {wrong}: code fixes their number, another layer takes them too, or they are "
        "added to or joined with (torch.cat) other ones"
    )


def _numbers(model: nn.Module, units: Units, sizes: set[int]) -> dict[str, dict[str, int]]:
    """Integers of these sizes among the attributes of modules without parameters around the layers."""
    names = [units.name, *(part.name for part in units.parts)]
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    around = ".".join(common)
    found = {}
    for raw, module in model.named_modules():
        name = clean_module_name(raw)
        inside = name == around or not around or name.startswith(f"{around}.")
        if not inside or not name or list(module.parameters(recurse=False)):
            continue
        own = {k: v for k, v in vars(module).items() if type(v) is int and v in sizes and not k.startswith("_")}
        if own:
            found[name] = own
    return found


def _wrong(
    model: nn.Module, units: Units, numbers: dict[str, dict[str, int]], num: int, call: Callable[[nn.Module], Tensor]
) -> str:
    """What is wrong with the model that keeps `num` of the units; empty where nothing is."""
    stay = torch.arange(units.num)[units.num - num :]
    gone = torch.arange(units.num)[: units.num - num]
    consumer = submodule(model, units.name)
    size = _channels(consumer) // units.num
    columns = (gone[:, None] * size + torch.arange(size)).flatten()
    made = copied(model)
    with evaluating(made), torch.no_grad():
        weight = submodule(made, units.name).get_parameter("weight")
        weight.index_fill_(_dims(consumer)[1], columns.to(weight.device), 0.0)
        wanted = call(made)
    try:
        cut_(made, units, stay, numbers)
        with evaluating(made), torch.no_grad():
            found = call(made)
    except (RuntimeError, ValueError, IndexError) as error:  # what is said of a shape that does not fit may be anything
        return f"{_raising(made, error)} fails ({first_line(error)})"
    return "" if is_near(found, wanted) else "the model computes something else"


def _raising(model: nn.Module, error: BaseException) -> str:
    """The innermost module of a model in whose forward pass an error was raised."""
    names = {id(module): clean_module_name(name) for name, module in model.named_modules()}
    through = (names.get(id(frame.f_locals.get("self"))) for frame, _ in traceback.walk_tb(error.__traceback__))
    return next(filter(None, reversed(list(through))), "the model")


def _channels(layer: nn.Module) -> int:
    return layer.get_parameter("weight").shape[_dims(layer)[1]]


def _dims(layer: nn.Module) -> tuple[int, int]:
    """The dimensions of a weight along which its outputs and its input channels run."""
    layout = layout_of(layer)
    assert layout is not None
    rows, columns = layout.sides[-2:]
    of = [set(names) for names in layout.dims]
    return next(i for i, names in enumerate(of) if names & set(rows)), next(
        i for i, names in enumerate(of) if names & set(columns)
    )


@torch.no_grad()
def cut_(model: nn.Module, units: Units, stay: Tensor, numbers: dict[str, dict[str, int]]) -> None:
    """Removes the columns and rows of units in place, and nothing more.

    Args:
        model: changed in place.
        units: as long as all are there.
        stay: which of them stay.
        numbers: from `numbers_for`.
    """
    consumer = submodule(model, units.name)
    dim = _dims(consumer)[1]
    of_columns = torch.arange(_channels(consumer)).view(units.num, -1)[stay].flatten()
    _slice_(consumer, {"weight": dim}, "columns", of_columns)
    for name in dict.fromkeys(part.name for part in units.parts):
        module = submodule(model, name)
        outputs = [torch.tensor(p.outputs).view(units.num, -1)[stay].flatten() for p in units.parts if p.name == name]
        if isinstance(module, nn.MultiheadAttention):
            num_heads = module.num_heads * len(stay) // units.num
            sliced_(module, rows_of_heads(module, torch.cat(outputs)), {"num_heads": num_heads})
            continue
        along = dict.fromkeys((k for k, t in _own(module) if t.ndim), 0)
        if not is_elementwise(module):
            along["weight"] = _dims(module)[0]
        _slice_(module, along, "rows", torch.cat(outputs).sort().values)
    for name, own in numbers.items():
        sliced_(submodule(model, name), {}, {key: value * len(stay) // units.num for key, value in own.items()})


def _slice_(layer: nn.Module, along: dict[str, int], side: str, at: Tensor) -> None:
    names = FEATURES[side]
    if side == "rows" and is_elementwise(layer) and layer_of(layer).operation == "convolution":
        names = (*names, *FEATURES["columns"], "groups")
    numbers = {name: len(at) for name in names if type(vars(layer).get(name)) is int}
    if isinstance(layer, nn.GroupNorm):
        numbers["num_groups"] = layer.num_groups * len(at) // layer.num_channels
    sliced_(layer, {name: (dim, at) for name, dim in along.items()}, numbers)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


@torch.no_grad()
def compensate_(model: nn.Module, s: WeightedSVD, kept: int) -> None:
    """Moves the columns that stay to make up for those that go, which become zero; the bias takes up the mean.

    Args:
        model: changed in place.
        s: the steps of a layer.
        kept: columns that stay.
    """
    layer = submodule(model, s.name)
    lost = s.left[:, kept:] @ s.right[kept:]
    bias: Any = layer._parameters.get("bias")
    if bias is not None and s.mean is not None:
        bias.add_((lost @ s.mean).to(bias.dtype))
    layout = layout_of(layer)
    assert layout is not None
    w = matrix_of(layer)
    layer.get_parameter("weight").copy_(layout.join((w.double() - lost).to(w.dtype)))
