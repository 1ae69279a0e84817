"""The functions of torch that apply a weight as `y = W x` on rows, in one table: a row for each function.

A row names the function's arguments and the reader of its calls (`products.py`, `lookups.py`, `convolutions.py`). A
reader gives a `Form`: which rows enter the weight's matrix, which rows of the output's gradient belong to them, and
along which dimensions of the weight each runs. It knows nothing of blocks: `layout_sides.py` matches it to a
layout's axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.recording import convolutions, lookups, products
from gramian.recording.form import Form, IsWeight, Row

__all__ = ["FORMS", "Form", "read"]

_CONVOLUTION = Row("input weight bias stride padding dilation groups", convolutions.convolution)
_TRANSPOSED = Row(
    "input weight bias stride padding output_padding groups dilation", convolutions.transposed_convolution
)
_EMBEDDING = Row("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", lookups.embedding)
_BAG = Row(
    "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights include_last_offset "
    "padding_idx",
    lookups.bag,
)
_BILINEAR = Row("input1 input2 weight bias", products.bilinear)
_MATMUL = Row("input other", products.matmul)
_MM = Row("input mat2:other", products.matmul)
_STACK = "input batch1:mat1 batch2:mat2 beta alpha"

# By name, for torch's function and the method of a tensor alike.
_EVERYWHERE: dict[str, Row] = {
    "matmul": _MATMUL,
    "__matmul__": _MATMUL,
    "__rmatmul__": Row("self:other other:input", products.matmul),
    "mm": _MM,
    "bmm": _MM,
    "mv": Row("input vec:other", products.matmul),
    "inner": Row("input other:weight", products.linear),
    "addmm": Row("input mat1 mat2 beta alpha", products.addmm),
    "addmv": Row("input mat:mat1 vec:mat2 beta alpha", products.addmm),
    "baddbmm": Row(_STACK, products.addmm),
    "addbmm": Row(_STACK, products.addbmm),
    "index_select": Row("input dim index", lookups.index_select),
    "__getitem__": Row("input index", lookups.indexing),
}
_EVERYWHERE |= {f"{name}_": _EVERYWHERE[name] for name in ("addmm", "addmv", "baddbmm", "addbmm")}

FORMS: dict[Callable, Row] = {
    **{
        getattr(home, name): row for name, row in _EVERYWHERE.items() for home in (torch, Tensor) if hasattr(home, name)
    },
    **{getattr(F, f"conv{n}d"): _CONVOLUTION for n in "123"},
    **{getattr(F, f"conv_transpose{n}d"): _TRANSPOSED for n in "123"},
    F.linear: Row("input weight bias", products.linear),
    F.embedding: _EMBEDDING,
    F.embedding_bag: _BAG,
    F.bilinear: _BILINEAR,
    torch.bilinear: _BILINEAR,
    torch.linalg.matmul: _MATMUL,
    torch.sparse.mm: Row("sparse:input dense:other", products.matmul),
    torch.einsum: Row("equation *operands", products.einsum),
    torch.tensordot: Row("a:input b:other dims", products.tensordot),
    torch.linalg.multi_dot: Row("tensors:matrices", products.chain),
    torch.chain_matmul: Row("*matrices", products.chain),
}
"""For each function of torch that applies a weight, how its calls are read."""

for _name, _names in (("_grouped_mm", "input mat2:weight"), ("grouped_mm", "mat_a:input mat_b:weight")):
    for _home in (torch, F):
        if hasattr(_home, _name):
            FORMS[getattr(_home, _name)] = Row(f"{_names} offs bias out_dtype", products.grouped)


def read(func: Callable, is_weight: IsWeight, args: tuple, kwargs: Mapping[str, Any]) -> list[Form]:
    """The uses of weights in a call of torch; none where it is not a product of a weight with rows."""
    row = FORMS.get(func)
    return [] if row is None else row.read(is_weight, args, kwargs)
