"""The ranks and bits of a compressed model: read off its modules, and put into a dense model of the same kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gramian.compression.layers.lowrank import LowRank, matrix_of
from gramian.compression.layers.modules import clean_module_name, replaced, submodule
from gramian.compression.layers.opening import close_, open_
from gramian.compression.layers.quantized import Quantized
from gramian.compression.storage.slicing import SLICED, resized
from gramian.layers import is_affine, operation_of

__all__ = ["factor", "openable", "ranks_of", "restore"]


def ranks_of(model: nn.Module) -> dict[str, Any]:
    """What each replaced layer is by its clean name, an outer one before those within it.

    A factored one is its rank, a quantized one its bits and group with the shape of its weight, by which files are read
    without the model: `{"a": 12, "b": {"bits": 4, "group": 64, "shape": [9, 64], "transposed": false}}`; one with fewer
    rows or columns its shapes, and the numbers among its attributes that went down with them.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        sliced = vars(module).get(SLICED)
        what: Any = None
        if isinstance(module, LowRank):
            what = module.rank
        elif isinstance(module, Quantized):
            what = module.about
        if sliced is not None:
            what = sliced if what is None else {**sliced, "then": what}
        if what is not None:
            found[clean_module_name(name)] = what
    return found


def _is_sliced(what: Any) -> bool:
    """Whether a value of `ranks_of` is that of a layer with fewer rows or columns."""
    return isinstance(what, Mapping) and "shapes" in what


def openable(ranks: Mapping[str, Any]) -> list[str]:
    """The names of which modules may be opened at once: what has lost heads is opened when it has lost them."""
    return [name for name in ranks if not _is_sliced(ranks.get(_outer(name)))]


def _outer(name: str) -> str:
    return name.rpartition(".")[0]


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
    open_(model, openable(ranks))
    try:
        for name, what in ranks.items():
            layer = old = submodule(model, name)
            if _is_sliced(what):
                layer, what = resized(layer, what), what.get("then")
                if what is None:
                    dense[name] = old
                    model = replaced(model, name, layer)
                    within = [other for other in ranks if _outer(other) == name]
                    if within:
                        open_(model, within)
                    continue
            fits = operation_of(layer).factors and is_affine(layer) and getattr(layer, "groups", 1) == 1
            if not fits:
                raise ValueError(f"{name} is a {type(layer).__name__}, which cannot be factored or quantized")
            made = _quantized(name, layer, what) if isinstance(what, Mapping) else _factored(name, layer, what)
            shared = tied.setdefault(id(old._parameters.get("weight")), made)  # which stays alive, so its id is its own
            if shared is not made and isinstance(shared, LowRank) and isinstance(made, LowRank):
                made.tie_(shared, layer._parameters.get("bias"))
            dense[name] = old
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
    if not {"bits", "group"} <= what.keys() <= {"bits", "group", "shape", "transposed"}:
        raise ValueError(f"{name} cannot be {dict(what)!r:.60}, wanted its bits and group")
    return Quantized(layer, what["bits"], what["group"])


def restore(model: nn.Module, dense: Mapping[str, nn.Module]) -> nn.Module:
    """The model with these layers put back, the last first."""
    for name, layer in reversed([*dense.items()]):
        model = replaced(model, name, layer)
    close_(model)
    return model
