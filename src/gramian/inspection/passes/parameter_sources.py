"""From which parameters values come: the way back through autograd's graph, up to the first products with a matrix."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gramian.inspection.passes.records import Source

__all__ = ["Trace", "trace"]

# Nodes looked at, the nearest first: a recurrent state goes back to the first step.
MOST_NODES = 64

# Nodes of autograd that a gate is made with, of which one is passed, and those that move values or change each by a
# product or sum.
_FUNCTIONS = ("Sigmoid", "Hardsigmoid", "Tanh")
_ELEMENTWISE = (
    "Rsub", "Neg", "Sub", "Add", "Mul", "Div", "MaskedFill", "Pow",
    "View", "UnsafeView", "ReshapeAlias", "Expand", "Clone", "ToCopy", "Alias", "NativeDropout", "Split",
    "SplitWithSizes", "Slice", "Select", "Unbind", "Unsqueeze", "Squeeze", "Permute", "Transpose", "T",
)  # fmt: skip
_MOVES = ("Unsqueeze", "Squeeze", "Permute", "Transpose", "T", "Unbind")
_SCALINGS = ("Mul", "Div")
# Products with a weight, and norms: places of the weights and of the bias among the node's inputs.
_PRODUCTS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "Addmm": ((1, 2), 0), "Addbmm": ((1, 2), 0), "Baddbmm": ((1, 2), 0), "Addmv": ((1, 2), 0), "Linear": ((1,), 2),
    "Mm": ((0, 1), None), "Bmm": ((0, 1), None), "Mv": ((0, 1), None), "Dot": ((0, 1), None),
    "Convolution": ((1,), 2), "MkldnnConvolution": ((1,), 2), "CudnnConvolution": ((1,), None),
    "NativeBatchNorm": ((1,), 2), "CudnnBatchNorm": ((1,), 2), "NativeLayerNorm": ((1,), 2),
    "NativeGroupNorm": ((1,), 2), "Embedding": ((0,), None),
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Those of a dimension, counted from the last as 1, of `size`, that values are of: every `step`-th."""

    dim: int
    size: int
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True)
class Trace:
    """Where values come from.

    Attributes:
        sources: the parameters of the products, norms and sums that were reached.
        ends: the nodes at which the way back ended, with the rows of their results.
        depends: whether the values depend on more than parameters.
    """

    sources: tuple[Source, ...]
    ends: frozenset[tuple[Any, tuple[Rows, ...]]]
    depends: bool


def trace(t: Tensor, names: Mapping[int, str], *, is_before: bool = False) -> Trace:
    """Go back from a tensor to the parameters that its values are made of by one product with a matrix.

    Args:
        t: with a graph; without one, nothing is found.
        names: of parameters, by id.
        is_before: whether the tensor is no gate, so that the way back ends at the functions that gates are made with.

    Returns: a `Trace`.
    Cost: linear in the nodes between, without touching a value.
    """
    found: dict[Source, None] = {}
    ends: set[tuple[Any, tuple[Rows, ...]]] = set()
    ahead: deque[tuple[Any, int, tuple[Rows, ...], bool, bool]] = deque(
        [(t.grad_fn, t.output_nr, (), False, is_before)]
    )
    for _ in range(MOST_NODES):
        if not ahead:
            break
        node, index, rows, is_scaled, is_behind = ahead.popleft()
        kind = _kind(node)
        if node is None:
            continue
        if kind == "AccumulateGrad":
            found |= dict.fromkeys(_sources(node, names, None, is_bias=not is_scaled))
        elif kind in _ELEMENTWISE or (kind in _FUNCTIONS and not is_behind):
            rows, is_behind = _before(node, kind, index, rows), is_behind or kind in _FUNCTIONS
            ahead += [(n, i, rows, is_scaled or kind in _SCALINGS, is_behind) for n, i in node.next_functions]
        else:
            ends.add((node, rows))
            weights, bias = _PRODUCTS.get(kind, ((), None))
            dim = _channel_dim(node, kind)
            own = next((r for r in rows if r.dim == dim), None)
            for place, (n, _) in enumerate(node.next_functions):
                if place == bias or place in weights:
                    found |= dict.fromkeys(_sources(n, names, own, is_bias=place == bias))
    return Trace(tuple(found), frozenset(ends), t.grad_fn is None or bool(ends))


def _kind(node: Any) -> str:
    return type(node).__name__.partition("Backward")[0]


def _sources(node: Any, names: Mapping[int, str], rows: Rows | None, *, is_bias: bool) -> Iterator[Source]:
    """The parameter at a node, or behind casts and transposes."""
    while node is not None and _kind(node) in ("T", "Transpose", "Permute", "ToCopy", "View", "Expand", "Unsqueeze"):
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)
    if variable is not None and id(variable) in names:
        name = names[id(variable)]
        yield Source(name, is_bias) if rows is None else Source(name, is_bias, rows.start, rows.stop, rows.step)


def _channel_dim(node: Any, kind: str) -> int:
    """The dimension, from the last, that a bias is added along; 0 where that is not known."""
    if kind.endswith(("BatchNorm", "GroupNorm")):
        return 0
    if "Convolution" in kind:
        return len(node._saved_stride) + 1
    return 1


def _before(node: Any, kind: str, index: int, rows: tuple[Rows, ...]) -> tuple[Rows, ...]:
    """The rows of a node's input that `rows` of its output number `index` are, in those dimensions that are known."""
    made = tuple(map(int, node._input_metadata[index].shape))
    if kind in ("Split", "SplitWithSizes", "Slice"):
        sizes = node._saved_self_sym_sizes
        dim = len(sizes) - _signed(node._saved_dim) % len(sizes)
        size = int(sizes[-dim])
        start, stop = _part(node, kind, index)
        start, stop = max(0, start + size if start < 0 else start), min(size, stop + size if stop < 0 else stop)
        if stop - start == size:
            return rows
        inner = next((r for r in rows if r.dim == dim), Rows(dim, size, 0, stop - start))
        found = replace(inner, size=size, start=start + inner.start, stop=start + inner.stop)
        return (*(r for r in rows if r.dim != dim), found)
    if kind in ("View", "UnsafeView", "ReshapeAlias"):
        return through_view(tuple(map(int, node._saved_self_sym_sizes)), made, rows)
    if kind in ("Select", "Unbind"):
        dim = len(made) + 1 - _signed(node._saved_dim) % (len(made) + 1)
        size = int(node._saved_self_sym_sizes[-dim]) if kind == "Select" else len(node._input_metadata)
        place = _signed(node._saved_index) % size if kind == "Select" else index
        return (*(r if r.dim < dim else replace(r, dim=r.dim + 1) for r in rows), Rows(dim, size, place, place + 1))
    if kind in ("Transpose", "T", "Permute"):
        if kind == "Permute":
            dims = [_signed(d) % len(made) for d in node._saved_dims]
        else:
            dims, pair = list(range(len(made))), (0, 1)
            if kind == "Transpose":
                pair = (_signed(node._saved_dim0), _signed(node._saved_dim1))
            one, other = (p % len(made) for p in pair)
            dims[one], dims[other] = other, one
        return tuple(replace(r, dim=len(made) - dims[-r.dim]) for r in rows)
    if kind == "Unsqueeze":
        place = _signed(node._saved_dim) % len(made)
        return through_view(made[:place] + made[place + 1 :], made, rows)
    return () if kind in _MOVES else rows


def through_view(given: tuple[int, ...], made: tuple[int, ...], rows: tuple[Rows, ...]) -> tuple[Rows, ...]:
    """The rows of a tensor of shape `given` that `rows` of its view of shape `made` are, as far as they are known.

    Dimensions are matched from the last: one for one, or one that the view divides.
    """
    of = {r.dim: r for r in rows}
    found: list[Rows] = []
    i = o = 1
    while i <= len(given) and o <= len(made):
        if given[-i] == made[-o]:
            found += [replace(of[o], dim=i)] if o in of else []
            i, o = i + 1, o + 1
        elif made[-o] == 1:
            o += 1
        elif made[-o] > given[-i]:
            break  # several dimensions become one
        else:
            first, total = o, 1
            while o <= len(made) and total < given[-i]:
                total *= made[-o]
                o += 1
            if total != given[-i]:
                break
            parts = [of.get(d) or Rows(d, made[-d], 0, made[-d]) for d in range(o - 1, first - 1, -1)]
            found += _joined(i, parts)
            i += 1
    return tuple(found)


def _joined(dim: int, parts: Sequence[Rows]) -> list[Rows]:
    """The rows of a dimension that is divided in parts, the outermost first; none where all or irregular."""
    size = math.prod(part.size for part in parts)
    start, block = 0, size
    for k, part in enumerate(parts):
        inside = parts[k + 1 :]
        inner = block // part.size
        if part.stop - part.start == 1:
            start, block = start + part.start * inner, inner
        elif all(p.stop - p.start == p.size for p in inside):
            start, block = start + part.start * inner, (part.stop - part.start) * inner
            break
        elif part.stop - part.start == part.size and len(inside) == 1 and inside[0].stop - inside[0].start == 1:
            return [Rows(dim, size, start + inside[0].start, start + block, inner)]
        else:
            return []
    return [] if block == size else [Rows(dim, size, start, start + block)]


def _part(node: Any, kind: str, index: int) -> tuple[int, int]:
    """Where the output number `index` of a split or slice begins and ends."""
    if kind == "Slice":
        return _signed(node._saved_start), _signed(node._saved_end)
    sizes = [int(node._saved_split_size)] * (index + 1) if kind == "Split" else list(map(int, node._saved_split_sizes))
    return sum(sizes[:index]), sum(sizes[: index + 1])


def _signed(value: Any) -> int:
    """An argument that autograd saved as an unsigned number."""
    value = int(value)
    return value - 2**64 if value >= 2**63 else value
