"""What the families are compared with: torch's own operations on the weights, and what hooks see of a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# By the name of the operation, the arguments that are matrices, and for each the axis that the product runs over.
PRODUCTS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "mm": ((0, -1), (1, -2)),
    "bmm": ((0, -1), (1, -2)),
    "mv": ((0, -1),),
    "addmm": ((1, -1), (2, -2)),
    "addmv": ((1, -1),),
    "baddbmm": ((1, -1), (2, -2)),
    "_grouped_mm": ((0, -1), (1, -2)),
}
# What still is the weight afterwards: a copy, a choice of experts, a normalized weight.
COPIES = ("index", "index_select", "cat", "clone", "_to_copy", "_weight_norm_interface", "native_batch_norm")
TABLES = ("embedding", "gather")


@dataclass
class Use:
    """How a parameter takes part in a forward pass: the kinds of its uses, and the axes that products run over."""

    kinds: set[str] = field(default_factory=set)
    contracted: set[int] = field(default_factory=set)

    @property
    def shown(self) -> str:
        return ", ".join(sorted(self.kinds)) or "nothing"


class Uses(TorchDispatchMode):
    """Records which operations the memory of each parameter, its views and its copies go into."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.uses: dict[int, Use] = defaultdict(Use)
        self.memory: dict[int, Tensor] = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
        self.reordered: set[int] = set()
        self.kept: list[Any] = []  # copies, so that their memory is not given to others

    def _parameter(self, value: Any) -> Tensor | None:
        if not isinstance(value, Tensor) or value.numel() == 0:
            return None
        return self.memory.get(value.untyped_storage().data_ptr())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        values = [v for arg in args for v in (arg if isinstance(arg, list | tuple) else (arg,))]
        for value in values:
            parameter = self._parameter(value)
            if parameter is not None:
                self._note(func, name, args, value, parameter)
        first = self._parameter(args[0]) if args else None
        if name in COPIES and first is not None:
            copied = output[0] if isinstance(output, tuple) else output
            self.memory[copied.untyped_storage().data_ptr()] = first
            self.kept.append(copied)
            if "index" not in name:  # its axes may have another order in memory
                self.reordered.add(copied.untyped_storage().data_ptr())
        return output

    def _note(self, func: Any, name: str, args: tuple, value: Tensor, parameter: Tensor) -> None:
        use = self.uses[id(parameter)]
        at = next((i for i, arg in enumerate(args) if arg is value), -1)
        if name in PRODUCTS:
            axis = dict(PRODUCTS[name]).get(at)
            if axis is None:
                use.kinds.add("elementwise")  # a bias that addmm adds
                return
            use.kinds.add("matrix")
            strides, known = parameter.stride(), value.untyped_storage().data_ptr() not in self.reordered
            if known and value.shape[axis] > 1 and value.stride(axis) in strides and value.dtype == parameter.dtype:
                use.contracted.add(strides.index(value.stride(axis)))
        elif name in ("convolution", "mkldnn_rnn_layer", "lstm"):
            depthwise = name == "convolution" and value.ndim > 1 and args[-1] > 1 and value.shape[1] == 1
            use.kinds.add("elementwise" if value.ndim < 2 else "depthwise" if depthwise else "matrix")
        elif name in TABLES:
            use.kinds.add("table")
        elif not func.is_view and name not in COPIES and name not in ("detach", "empty_like"):
            use.kinds.add("elementwise")


def uses_of(model: nn.Module, forward: Callable[[], Any]) -> dict[int, Use]:
    """The uses of each parameter (by id) in a forward pass."""
    with torch.no_grad(), Uses(model) as recorded:
        forward()
    return recorded.uses


def hooked_moments(model: nn.Module, forward: Callable[[], Tensor], units: int) -> dict[nn.Module, dict[str, Tensor]]:
    """A and G of every plain linear layer and convolution that runs, in float64, from forward and tensor hooks."""
    inputs: dict[nn.Module, list[Tensor]] = defaultdict(list)
    gradients: dict[nn.Module, list[Tensor]] = defaultdict(list)

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output  # a router, which derives from Linear
        inputs[module].append(_rows(module, args[0].detach().double()))
        _check_plain(module, inputs[module][-1], output.detach().double())
        output = output.clone()  # no view, whose hook would be lost where the model changes it in place
        output.register_hook(lambda g: gradients[module].append(_outputs(module, g.double())))
        return output

    handles = [m.register_forward_hook(hook) for m in model.modules() if _is_plain(m)]
    flags = [p.requires_grad for p in model.parameters()]
    try:
        for p in model.parameters():
            p.requires_grad_()
        forward().backward()
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in zip(model.parameters(), flags, strict=True):
            p.requires_grad_(flag).grad = None
    moments = {}
    for module, rows in inputs.items():
        x, g = torch.cat(rows), torch.cat(gradients[module]) if gradients[module] else None
        moments[module] = {"A": x.T @ x / len(x)} | ({} if g is None else {"G": units * (g.T @ g)})
    return moments


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear"):
        return "weight" in module._parameters  # PEFT's Linear has that of the layer inside it
    return type(module) in (nn.Conv1d, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"


def _check_plain(module: Any, rows: Tensor, output: Tensor) -> None:
    """The layer computes W x + b of the rows that were cut out for it, or the oracle is wrong."""
    weight = module.weight.detach().double()
    weight = weight.T if type(module).__name__ == "Conv1D" else weight.flatten(1)
    bias = 0 if getattr(module, "bias", None) is None else module.bias.detach().double()
    torch.testing.assert_close(rows @ weight.T + bias, _outputs(module, output), rtol=1e-3, atol=1e-3)


def _rows(module: Any, x: Tensor) -> Tensor:
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return x.flatten(0, -2)
    x = F.pad(x, module._reversed_padding_repeated_twice)
    if x.ndim == 3:
        x, kernel, stride, dilation = (
            x[:, :, None],
            (1, *module.kernel_size),
            (1, *module.stride),
            (1, *module.dilation),
        )
    else:
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    return F.unfold(x, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)


def _outputs(module: nn.Module, g: Tensor) -> Tensor:
    return g.flatten(0, -2) if not isinstance(module, (nn.Conv1d, nn.Conv2d)) else g.transpose(0, 1).flatten(1).T
