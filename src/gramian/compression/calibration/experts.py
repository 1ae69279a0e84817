"""Experts: the matrices of a stack in one parameter, as layers of their own.

A module of experts asks for its parameter by name and hands it to one function. An opened one has a linear layer for
each expert, and puts their weights together where the parameter is asked for: that saves bytes, and no time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gramian.block import Block
from gramian.compression.layers.factored_weight import FactoredWeight
from gramian.layers import layer_of

__all__ = [
    "OPENED",
    "close_stacks_",
    "dense_weight",
    "expert_name",
    "is_stack",
    "open_stack_",
    "rows_of_parts",
    "stack_of",
]

_EACH = "each_"
"""What the name of a parameter begins with where it is that of the list of layers. The names by which transformers
converts the weights of experts do not fit it."""

OPENED: dict[type[nn.Module], type[nn.Module]] = {}
"""By opened class what it was."""
_STACKS = "_gramian_stacks"
"""The attribute of an opened module that says of each stack whether its matrices are (inputs, outputs)."""


class _OpenStacks:
    """Stacks of matrices are put together of the layers that they were taken apart into."""

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get(_STACKS, {}):
            return super().__getattr__(name)  # type: ignore[misc]
        weights = [layer.weight for layer in self.__dict__["_modules"][_EACH + name]]
        whole = torch.stack([w.product() if isinstance(w, FactoredWeight) else w for w in weights])
        return whole.mT if self.__dict__[_STACKS][name] else whole

    def __reduce_ex__(self, protocol: Any) -> Any:
        """An opened class is made when it is needed, so it is found by what it was."""
        return _empty, (OPENED[type(self)],), self.__dict__  # type: ignore[index]


def _opened(cls: type[nn.Module]) -> type[nn.Module]:
    for opened, was in OPENED.items():
        if was is cls:
            return opened
    made = type(f"Open{cls.__name__}", (_OpenStacks, cls), {"__module__": cls.__module__})
    OPENED[made] = cls
    return made


def _empty(cls: type[nn.Module]) -> nn.Module:
    opened = _opened(cls)
    return opened.__new__(opened)


def is_stack(block: Block) -> bool:
    """Whether a block is a parameter (E, ·, ·) of E matrices, of a module that is no layer of the table.

    Args:
        block: with its layout.
    """
    layout = block.layout
    if len(layout.dims) != 3 or len(block.owners) > 1 or layer_of(block.module).operation != "unknown":
        return False
    numbers, _, columns = layout.sides
    return len(layout.dims[0]) == 1 and layout.dims[0][0] in numbers and columns in layout.dims[1:]


def expert_name(stack: str, entry: int) -> str:
    """The name of the layer that a matrix of a stack becomes.

    Args:
        stack: the parameter's name.
        entry: which matrix.
    """
    outer, dot, local = stack.rpartition(".")
    return f"{outer}{dot}{_EACH}{local}.{entry}"


def stack_of(name: str) -> str:
    """The name of the parameter that a layer of this name is a part of; empty where it can be none."""
    outer, _, entry = name.rpartition(".")
    outer, dot, local = outer.rpartition(".")
    return f"{outer}{dot}{local.removeprefix(_EACH)}" if entry.isdigit() and local.startswith(_EACH) else ""


def dense_weight(name: str) -> str:
    """The name of the parameter that the weight of a layer of this name was, or was a part of.

    Args:
        name: of a layer that was replaced.
    """
    return stack_of(name) or f"{name}.weight".lstrip(".")


def rows_of_parts(block: Block) -> Tensor:
    """For each matrix of a stack which of its outputs the rows of its parts are: (E, rows), of gate and up one after
    the other, however the parameter has them.

    Args:
        block: a stack.
    """
    shape = block.parameter.shape
    turned = _is_turned(block)
    outputs = torch.arange(shape[2] if turned else shape[1])
    outputs = outputs if turned else outputs[:, None]
    return block.split(outputs.expand(shape).contiguous())[..., 0].flatten(1)


def _is_turned(block: Block) -> bool:
    return block.layout.dims[1] == block.layout.sides[2]


def open_stack_(block: Block) -> None:
    """Opens, in place, the module of a stack: its parameter becomes a list of linear layers.

    Args:
        block: a stack.
    """
    module, local, turned = block.module, block.name.rpartition(".")[2], _is_turned(block)
    weight = module._parameters.pop(local)
    assert weight is not None
    layers = nn.ModuleList()
    for matrix in weight.detach().mT if turned else weight.detach():
        m, n = matrix.shape
        layer = nn.utils.skip_init(nn.Linear, n, m, bias=False, device=matrix.device, dtype=matrix.dtype)
        layer.weight = nn.Parameter(matrix.clone(memory_format=torch.contiguous_format), weight.requires_grad)
        layers.append(layer)
    layers.train(module.training)
    if type(module) not in OPENED:
        module.__class__ = _opened(type(module))
    module.__dict__[_STACKS] = module.__dict__.get(_STACKS, {}) | {local: turned}
    module._modules[_EACH + local] = layers


@torch.no_grad()
def close_stacks_(model: nn.Module) -> None:
    """Puts back, in place, the parameters of stacks of which nothing took the place of any layer."""
    for module in model.modules():
        if type(module) not in OPENED:
            continue
        left = dict(module.__dict__[_STACKS])
        for local, turned in list(left.items()):
            layers: Any = module._modules[_EACH + local]
            if any(type(layer) is not nn.Linear for layer in layers):
                continue
            whole = torch.stack([layer.weight for layer in layers])
            whole = whole.mT.contiguous() if turned else whole
            module._parameters[local] = nn.Parameter(whole, layers[0].weight.requires_grad)
            del module._modules[_EACH + local], left[local]
        module.__dict__[_STACKS] = left
        if not left:
            del module.__dict__[_STACKS]
            module.__class__ = OPENED[type(module)]
