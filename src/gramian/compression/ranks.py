"""The ranks and bits of a compressed model: read off its modules, and put into a dense model of the same kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gramian.compression.lowrank import LowRank, matrix_of
from gramian.compression.modules import clean_module_name, replaced, submodule
from gramian.compression.quantized import Quantized
from gramian.layers import is_affine, operation_of

__all__ = ["factor", "ranks_of", "restore"]


def ranks_of(model: nn.Module) -> dict[str, Any]:
    """What each replaced layer is by its clean name, an outer one before those within it.

    A factored one is its rank, a quantized one its bits and group: `{"a": 12, "b": {"bits": 4, "group": 64}}`.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            found[clean_module_name(name)] = module.rank
        elif isinstance(module, Quantized):
            found[clean_module_name(name)] = {"bits": module.bits, "group": module.group}
    return found


def factor(model: nn.Module, ranks: Mapping[str, Any]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The model with the layers of these names replaced, in place and without values; and the layers that were there.

    Args:
        model: dense.
        ranks: as from `ranks_of`.

    Raises:
        ValueError, TypeError, AttributeError: a layer is missing, or cannot have that rank or those bits; the model is
            as it was.
    """
    dense: dict[str, nn.Module] = {}
    tied: dict[int, nn.Module] = {}
    try:
        for name, what in ranks.items():
            layer = submodule(model, name)
            fits = operation_of(layer).factors and is_affine(layer) and getattr(layer, "groups", 1) == 1
            if not fits:
                raise ValueError(f"{name} is a {type(layer).__name__}, which cannot be factored or quantized")
            made = _quantized(name, layer, what) if isinstance(what, Mapping) else _factored(name, layer, what)
            shared = tied.setdefault(id(layer._parameters.get("weight")), made)
            if shared is not made and isinstance(shared, LowRank) and isinstance(made, LowRank):
                made.tie_(shared, layer._parameters.get("bias"))
            dense[name] = layer
            model = replaced(model, name, made)
    except BaseException:
        restore(model, dense)
        raise
    return model, dense


def _factored(name: str, layer: nn.Module, rank: Any) -> nn.Module:
    if not 0 < rank <= min(matrix_of(layer).shape):
        raise ValueError(f"{name} cannot have rank {rank}")
    return LowRank(layer, rank)


def _quantized(name: str, layer: nn.Module, what: Mapping[str, Any]) -> nn.Module:
    if what.keys() != {"bits", "group"}:
        raise ValueError(f"{name} cannot be {dict(what)!r:.60}, wanted its bits and group")
    return Quantized(layer, what["bits"], what["group"])


def restore(model: nn.Module, dense: Mapping[str, nn.Module]) -> nn.Module:
    """The model with these layers put back, the last first."""
    for name, layer in reversed([*dense.items()]):
        model = replaced(model, name, layer)
    return model
