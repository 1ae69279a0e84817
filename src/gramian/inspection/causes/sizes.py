"""How large matrices are beside what keeps a signal, and what is usual in a network."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from statistics import median

from torch import nn

from gramian.block import Block
from gramian.inspection.causes.context import Context
from gramian.inspection.experiments.intended_zeros import is_factor
from gramian.inspection.passes.moments import all_finite

__all__ = [
    "LARGEST",
    "RATIO",
    "SMALLEST",
    "by_layer",
    "cell_of",
    "hidden_sizes",
    "sized_matrices",
    "usual_size",
]

# σ = rms(W) √fan_in is 0.58 for torch's layers and up to 1.7 for other initializations. A layer is told when it leaves
# this range and differs from the median of the others by more than this ratio. Heuristics.
SMALLEST, LARGEST, RATIO = 0.05, 8.0, 8.0


def hidden_sizes(sized: Sequence[tuple[Block, float]]) -> list[float]:
    """The sizes of the hidden layers, and of all where there are none.

    Args:
        sized: as `sized_matrices` gives them.
    """
    return by_layer((b, s) for b, s in sized if b.role == "hidden") or by_layer(sized)


def usual_size(sized: Sequence[tuple[Block, float]]) -> float:
    """The median of the hidden layers' sizes.

    Args:
        sized: as `sized_matrices` gives them, one or more.
    """
    hidden, every = hidden_sizes(sized), by_layer(sized)
    if (len(every) == 2 or len(hidden) == 2) and max(hidden) > LARGEST:  # the other of two says what is usual
        return min(hidden if len(hidden) == 2 else every)
    return median(hidden)


def sized_matrices(context: Context) -> list[tuple[Block, float]]:
    """The hidden matrices and the head, each with rms(W) √fan_in; without those that have no scale to judge.

    The matrices of inputs and of the state of a recurrent cell are added up, and are one: √(‖W‖² + ‖U‖²) / √rows.

    Args:
        context: what was seen of a model.
    """
    found: list[tuple[Block, float]] = []
    cells: dict[str, int] = {}
    for block, w in context.values():
        if block.role in ("hidden", "head") and not is_factor(block.name) and all_finite(w) and bool(w.any()):
            size = float(w.float().square().mean().sqrt()) * math.sqrt(block.shape[-1])
            cell = cell_of(block)
            if cell in cells:
                other, before = found[cells[cell]]
                found[cells[cell]] = (block if size > before else other, math.hypot(size, before))
                continue
            if cell:
                cells[cell] = len(found)
            found.append((block, size))
    return found


def by_layer(sized: Iterable[tuple[Block, float]]) -> list[float]:
    """The sizes, with one for each recurrent module: its directions and layers were drawn in one way.

    Args:
        sized: as `sized_matrices` gives them.
    """
    found: dict[str, list[float]] = {}
    for block, size in sized:
        found.setdefault(block.name.rpartition(".")[0] if cell_of(block) else block.name, []).append(size)
    return [median(sizes) for sizes in found.values()]


def cell_of(block: Block) -> str:
    """Of a matrix of torch's recurrent modules, the name without what tells inputs from the state; else empty.

    Args:
        block: any.
    """
    is_cell = isinstance(block.module, (nn.RNNBase, nn.RNNCellBase))
    return re.sub(r"weight_[ih]h", "weight", block.name) if is_cell else ""
