"""Modules of a model by name, without what wraps them."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from gramian.block import Block
from gramian.checkpoint import clean_name
from gramian.checkpoint.names import WRAPPERS

__all__ = ["clean_module_name", "copied", "module_name", "replaced", "submodule"]


def module_name(block: Block) -> str:
    return block.name.rpartition(".")[0]


def clean_module_name(name: str) -> str:
    return clean_name(f"{name}.").rstrip(".")


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of a block by its clean name, which leaves out wrappers inside the model."""
    try:
        found = [model.get_submodule(name)]  # names of all modules take time, which a plan would take for each layer
    except AttributeError:
        found = []
    if not found or name != clean_module_name(name) or any(w.rstrip(".") in found[0]._modules for w in WRAPPERS):
        found = [m for raw, m in model.named_modules() if clean_module_name(raw) == name]
    if not found:
        raise AttributeError(f"{type(model).__name__} has no layer {name!r}")
    return found[-1]


def replaced(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with another module in every place of `name`; the other module itself where that is the whole model."""
    old = submodule(model, name)
    if old is model:
        return module
    for parent in list(model.modules()):
        for child, value in list(parent._modules.items()):  # named_children gives a shared one only once
            if value is old:
                setattr(parent, child, module)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(m is module for m in encoder.modules()):
            encoder.use_nested_tensor = False  # which only its kernel of dense weights takes
    return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also where torch's old norms of weights, or its pruning, keep what a pass computed."""
    computed = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})
