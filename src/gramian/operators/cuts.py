"""The graph of a forward pass, cut at the inputs of the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gramian.autograd import CUT_OFF
from gramian.block import blocks
from gramian.errors import UnsupportedError
from gramian.layers import operation_of, runs_as_its_class
from gramian.recording.hooks import hooks
from gramian.recording.taps import in_vmap


@dataclass(frozen=True)
class Use:
    """A use of a layer, at which the graph was cut."""

    name: str
    module: nn.Module
    arriving: Tensor  # the layer's input, with the graph that made it
    leaving: Tensor  # the leaf that the layer was given in its place


class Cuts:
    """The uses in the order of the forward pass."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.output: Tensor | None = None  # of the layer that was used last


@contextmanager
def cut(model: nn.Module, *, only_first: bool = False) -> Iterator[Cuts]:
    """Hooks that give every module of a block (or the first alone) a fresh leaf as input, and remember both."""
    cuts = Cuts()

    def before(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            x = args[0] if args else kwargs.get("input")
            if not (isinstance(x, Tensor) and x.is_floating_point()):
                return None
            if in_vmap():
                raise UnsupportedError(f"{name} runs inside torch.vmap, where the graph cannot be cut")
            if x.is_nested:
                raise UnsupportedError(f"{name} is given a nested tensor, whose rows have no one shape")
            if only_first and cuts.uses:
                cuts.uses.append(Use(name, module, x, x))
                return None
            leaf = x.detach().requires_grad_()
            cuts.uses.append(Use(name, module, x, leaf))
            given = leaf if runs_as_its_class(module) else leaf.clone()  # a leaf allows nothing in place
            return ((given, *args[1:]), kwargs) if args else (args, kwargs | {"input": given})

        return hook

    def after(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> Tensor | None:
            place = operation_of(module).gain
            if not place or not isinstance(output, Tensor) or (only_first and cuts.uses):
                return None
            if place == "input":
                cuts.output = output
                return output.clone()  # what follows may work in place
            leaf = output.detach().requires_grad_()  # indices have no Jacobian: start at what they select
            cuts.uses.append(Use(name, module, output, leaf))
            cuts.output = leaf.clone()
            return cuts.output

        return hook

    names: dict[nn.Module, str] = {}
    for block in blocks(model).blocks:
        for name, module in block.owners:
            names.setdefault(module, name)
    handles = []
    for module, name in names.items():
        handles += [module.register_forward_pre_hook(before(name), with_kwargs=True)]
        handles += [module.register_forward_hook(after(name))]
    with hooks(handles):
        try:
            yield cuts
        except RuntimeError as error:
            if CUT_OFF not in str(error):
                raise
            raise UnsupportedError("the loss differentiates by the inputs, which cuts separate from it") from error


def leaves_of(tensor: Tensor) -> set[int]:
    """The ids of the leaf tensors that `tensor`'s graph reaches."""
    variables = (getattr(node, "variable", None) for node in nodes_of(tensor))
    return {id(variable) for variable in variables if variable is not None}


def nodes_of(tensor: Tensor) -> Iterator[Any]:
    """The nodes of `tensor`'s graph, each once, its own first."""
    seen: set[Any] = set()
    stack = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)
