"""Opening: matrices of attention and recurrent modules as layers of their own, so that a layer can take their place.

`nn.MultiheadAttention` and `nn.LSTM` hold their weights as parameters and hand them to one function, and so do modules
of experts (`experts.py`). An opened module has a linear layer for each such weight, and reads the weight off it.
Whatever replaces that layer is multiplied out once in each pass: that saves bytes, and no time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from gramian.block import blocks
from gramian.compression.calibration.experts import OPENED, close_stacks_, is_stack, open_stack_, stack_of
from gramian.compression.layers.factored_weight import FactoredWeight
from gramian.compression.layers.modules import clean_module_name
from gramian.compression.layers.narrow_attention import NarrowAttention, attended_nested

__all__ = ["close_", "inner_name", "is_open", "open_"]


class _OpenAttention(nn.MultiheadAttention):
    """Its weight and bias of queries, keys and values are those of the layer `in_proj`."""

    @property
    def in_proj_weight(self) -> Any:
        """The weight as the function wants it."""
        return self._modules["in_proj"].weight  # type: ignore[union-attr]

    @property
    def in_proj_bias(self) -> Any:
        """The bias."""
        return self._modules["in_proj"].bias  # type: ignore[union-attr]

    def forward(self, query: Tensor, *args: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """torch's, which takes nested tensors in its kernel of dense weights alone."""
        call = partial(attended_nested, self) if query.is_nested else super().forward
        return call(query, *args, **named)


class _OpenNarrowAttention(_OpenAttention, NarrowAttention): ...


class _OpenRecurrence:
    """The weights that the function is given are read off layers: `ih_l0` for `weight_ih_l0`."""

    _modules: dict[str, Any]
    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor]:
        weights = [getattr(self, name) for name in self._flat_weights_names]
        return [w.product() if isinstance(w, FactoredWeight) else w for w in weights]

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        """Torch sets them again when the module moves; they are read anew at each call."""

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("_modules", {}).get(name.removeprefix("weight_"))
        return inner.weight if inner is not None and name.startswith("weight_") else super().__getattr__(name)  # type: ignore[misc]


class OpenLSTM(_OpenRecurrence, nn.LSTM):
    """An `nn.LSTM` of which a weight is a layer, and may have two factors, as a compressed model has it.

    Args:
        args: as those of `nn.LSTM`.
        kwargs: likewise.

    Raises: nothing of its own.
    Cost: that of torch's, and each product of factors once in a pass.
    Source: this library's own.

    >>> isinstance(OpenLSTM(2, 3), nn.LSTM)
    True
    """


class OpenGRU(_OpenRecurrence, nn.GRU):
    """An `nn.GRU` of which a weight is a layer, and may have two factors, as a compressed model has it.

    Args:
        args: as those of `nn.GRU`.
        kwargs: likewise.

    Raises: nothing of its own.
    Cost: that of torch's, and each product of factors once in a pass.
    Source: this library's own.

    >>> isinstance(OpenGRU(2, 3), nn.GRU)
    True
    """


class OpenRNN(_OpenRecurrence, nn.RNN):
    """An `nn.RNN` of which a weight is a layer, and may have two factors, as a compressed model has it.

    Args:
        args: as those of `nn.RNN`.
        kwargs: likewise.

    Raises: nothing of its own.
    Cost: that of torch's, and each product of factors once in a pass.
    Source: this library's own.

    >>> isinstance(OpenRNN(2, 3), nn.RNN)
    True
    """


OPEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: _OpenAttention,
    NarrowAttention: _OpenNarrowAttention,
    nn.LSTM: OpenLSTM,
    nn.GRU: OpenGRU,
    nn.RNN: OpenRNN,
}
"""By class what it is when it is opened."""
CLOSED = {opened: cls for cls, opened in OPEN.items()}
"""By opened class what it was."""


def is_open(module: nn.Module) -> bool:
    """Whether a module reads its weights off layers within it."""
    return type(module) in CLOSED or type(module) in OPENED


def inner_name(module: nn.Module, local: str) -> str:
    """The name of the layer that a parameter becomes when its module is opened; empty where it is none.

    Args:
        module: of the class itself: a subclass may use its weights otherwise.
        local: the parameter's name.
    """
    cls = CLOSED.get(type(module), type(module))
    if cls in (nn.MultiheadAttention, NarrowAttention):
        return "in_proj" if local == "in_proj_weight" else ""
    projected = local.startswith("weight_hr")
    return local.removeprefix("weight_") if cls in OPEN and local.startswith("weight_") and not projected else ""


def open_(model: nn.Module, names: Iterable[str]) -> None:
    """Opens, in place, the modules of which layers of these names would be.

    Args:
        model: any module.
        names: of layers; those that no module has when opened are passed over.
    """
    wanted = set(names)
    for raw, module in list(model.named_modules()):
        if type(module) not in OPEN and type(module) not in CLOSED:
            continue
        prefix = clean_module_name(raw)
        for local in [local for local, parameter in module._parameters.items() if parameter is not None]:
            inner = inner_name(module, local)
            if inner and f"{prefix}.{inner}".lstrip(".") in wanted:
                _open(module, local, inner)
    stacks = {stack_of(name) for name in wanted} - {""}
    for block in blocks(model).blocks if stacks else ():
        if block.name in stacks and is_stack(block):
            open_stack_(block)


def _open(module: Any, local: str, inner: str) -> None:
    weight = module._parameters.pop(local)
    assert weight is not None
    m, n = weight.shape
    layer = nn.utils.skip_init(nn.Linear, n, m, bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight = weight
    if inner == "in_proj":
        layer.bias = module._parameters.pop("in_proj_bias", None)
    layer.train(module.training)
    module.__class__ = OPEN.get(type(module), type(module))
    module.__dict__.pop("_flat_weights", None)
    module._modules[inner] = layer


def close_(model: nn.Module) -> None:
    """Puts back, in place, the weights of layers that nothing took the place of."""
    close_stacks_(model)
    for found in model.modules():
        module: Any = found
        if type(module) not in CLOSED:
            continue
        attention = isinstance(module, nn.MultiheadAttention)
        for inner, layer in list(module._modules.items()):
            if type(layer) is not nn.Linear or (attention and inner == "out_proj"):
                continue  # a factored one, or the output projection of attention
            del module._modules[inner]
            module._parameters[f"{inner}_weight" if attention else f"weight_{inner}"] = layer.weight
            if attention:
                module._parameters["in_proj_bias"] = layer.bias
        if not module._modules.keys() - {"out_proj"}:
            module.__class__ = CLOSED[type(module)]
            names = module.__dict__.get("_flat_weights_names")
            if names is not None:
                module.__dict__["_flat_weights"] = [getattr(module, name) for name in names]
