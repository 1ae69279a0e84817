"""Heads of torch's attention, whose class tells them: one function applies all its weights, and no layer is seen to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from gramian.compression.calibration.targets import by_pattern
from gramian.compression.layers.modules import clean_module_name
from gramian.compression.layers.narrow_attention import NarrowAttention
from gramian.compression.layers.opening import is_open
from gramian.compression.units.flow import Part, Units

__all__ = ["find_heads", "rows_of_heads"]

TOGETHER = {"in_proj_weight": 0, "in_proj_bias": 0}
"""Parameters with the rows of queries, keys and values one after the other, and the dimension along which they run."""
APART = {"q_proj_weight": 0, "k_proj_weight": 0, "v_proj_weight": 0, "bias_k": 2, "bias_v": 2}
"""Parameters of one of them."""


def find_heads(
    model: nn.Module, consumers: Collection[str], exclude: Sequence[str]
) -> tuple[list[Units], dict[str, str]]:
    """The heads of each `nn.MultiheadAttention`, as units of its output projection; and why others have none.

    Args:
        model: any module.
        consumers: names of layers whose columns may be removed.
        exclude: name patterns of layers that stay as they are, as "attention.in_proj".

    Returns:
        Units, and reasons by the name of a layer within an attention module.
    """
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found: list[Units] = []
    reasons: dict[str, str] = {}
    for raw, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        prefix = f"{clean_module_name(raw)}.".lstrip(".")
        within = [name for name in consumers if name.startswith(prefix)]
        why = _why_whole(prefix, module, exclude, uses)
        if why:
            reasons |= dict.fromkeys(within, why)
        elif f"{prefix}out_proj" in within:
            width = module.num_heads * module.head_dim
            rows = torch.arange(3 * width).view(3, width)
            parts = tuple(Part(prefix.rstrip("."), tuple(part.tolist())) for part in rows)
            found.append(Units(f"{prefix}out_proj", module.num_heads, parts))
    return found, reasons


def _why_whole(prefix: str, module: nn.MultiheadAttention, exclude: Sequence[str], uses: Counter[int]) -> str:
    """Why a module keeps its heads; empty where they may go."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if is_open(module) or list(module.out_proj.children()):
        return "its attention is factored: remove its heads first (gm.narrow), then factor (gm.compress)"
    if type(module) not in (nn.MultiheadAttention, NarrowAttention):
        return f"the heads of {type(module).__name__}, a subclass of nn.MultiheadAttention, are not known to be torch's"
    if not own or not own.keys() <= TOGETHER.keys() | APART.keys() or list(module.buffers(recurse=False)):
        return "its attention has a weight that is made of others, or parameters that torch's does not have"
    if any(uses[id(p)] > 1 for p in own.values()):
        return "a parameter of its attention is shared with another module"
    if module.num_heads < 2:
        return "its attention has one head"
    matrices = (f"{prefix}{name.removesuffix('_weight')}" for name in own if name.endswith("_weight"))
    return next(filter(None, (by_pattern(name, None, exclude) for name in matrices)), "")


def rows_of_heads(module: nn.MultiheadAttention, rows: Tensor) -> dict[str, tuple[int, Tensor]]:
    """Where the rows that stay lie in each parameter: its dimension, and the entries.

    Args:
        module: with all of its rows.
        rows: of queries, keys and values one after the other, in the order of the units; as many of each.
    """
    rows = rows.sort().values
    where = dict.fromkeys(TOGETHER, rows) | dict.fromkeys(APART, rows[: len(rows) // 3])
    return {
        name: (dim, where[name]) for name, dim in (TOGETHER | APART).items() if module._parameters.get(name) is not None
    }
