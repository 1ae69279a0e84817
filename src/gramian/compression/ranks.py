"""The ranks of a factored model: read off its modules, and put into a dense model of the same kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gramian.compression.lowrank import LowRank, matrix_of
from gramian.compression.modules import clean_module_name, replaced, submodule
from gramian.layers import is_affine, operation_of

__all__ = ["factor", "ranks_of", "restore"]


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank of each factored layer by its clean name, an outer one before those within it."""
    return {clean_module_name(name): _rank(m) for name, m in model.named_modules() if isinstance(m, LowRank)}


def factor(model: nn.Module, ranks: Mapping[str, Any]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The model with the layers of these names factored, in place and without values; and the layers that were there.

    Raises:
        ValueError, TypeError, AttributeError: a layer is missing, or cannot have that rank; the model is as it was.
    """
    dense: dict[str, nn.Module] = {}
    try:
        for name, rank in ranks.items():
            layer = submodule(model, name)
            fits = operation_of(layer).factors and is_affine(layer) and getattr(layer, "groups", 1) == 1
            if not fits or not 0 < rank <= min(matrix_of(layer).shape):
                raise ValueError(f"{name} cannot have rank {rank}")
            low = LowRank(layer, rank)
            dense[name] = layer
            model = replaced(model, name, low)
    except BaseException:
        restore(model, dense)
        raise
    return model, dense


def restore(model: nn.Module, dense: Mapping[str, nn.Module]) -> nn.Module:
    """The model with these layers put back, the last first."""
    for name, layer in reversed([*dense.items()]):
        model = replaced(model, name, layer)
    return model


def _rank(low: LowRank) -> int:
    """The rank; a factor that was factored again has no weight but a product."""
    weight: Any = low[1].weight
    return weight.shape[1]
