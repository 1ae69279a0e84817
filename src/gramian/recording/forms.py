"""How each operation of torch applies a weight: as `y = W x` on rows, in one table.

A `Form` says which rows enter the weight's matrix, which rows of the output's gradient belong to them, and along which
dimensions of the weight each runs. It knows nothing of blocks: `sides.py` matches it to a layout's axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.gram import Sums
from gramian.recording.correlation import moment_of_windows, pays
from gramian.recording.windows import chunks_of_windows, paddings, windows

__all__ = ["FORMS", "Form"]

IsWeight = Callable[[Any], bool]


@dataclass(frozen=True)
class Form:
    """One use of a weight.

    `inputs(mask)` yields the input rows (R, D) in chunks; D runs over the weight's dimensions `in_dims` in order.
    `outputs(grad)` gives the rows (R, D') of the output's gradient, over `out_dims`. A dimension in both (experts,
    groups) numbers a batch of products. `groups` > 1: dimension 0 of the weight starts with that many groups, which the
    other side has too. `onehot`: the input rows are given as indices. `source` is the tensor that the inputs come from.
    `moment`, where it exists, computes the inputs' sums faster than from their rows.
    """

    op: str
    weight: Tensor
    source: Tensor
    inputs: Callable[[Tensor | None], Iterator[Tensor]]
    outputs: Callable[[Tensor], Tensor]
    in_dims: tuple[int, ...]
    out_dims: tuple[int, ...]
    groups: int = 1
    onehot: bool = False
    moment: Callable[[], Sums] | None = None


Handler = Callable[..., Form | None]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _plain_rows(x: Tensor) -> Callable[[Tensor | None], Iterator[Tensor]]:
    """The rows of x (…, D) where a mask over its leading dimensions, or over its rows (flat tokens), is true."""

    def rows(mask: Tensor | None) -> Iterator[Tensor]:
        if mask is not None and x.ndim == 2 and len(x) == mask.numel():
            mask = mask.flatten()
        yield _rows(x) if not _covers(mask, x) else _rows(x[mask])

    return rows


def _covers(mask: Tensor | None, x: Tensor) -> bool:
    return mask is not None and x.ndim > mask.ndim and x.shape[: mask.ndim] == mask.shape


def _linear(is_weight: IsWeight, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Form | None:
    return Form("linear", weight, input, _plain_rows(input), _rows, (1,), (0,))


def _matmul(
    is_weight: IsWeight, input: Tensor, other: Tensor | None = None, *, mat2: Tensor | None = None, **rest: Any
) -> Form | None:
    other = mat2 if other is None else other  # `mm` and `bmm` call it mat2
    assert other is not None
    if is_weight(other):
        w, x = other, input
        if w.ndim == 2:
            return Form("matmul", w, x, _plain_rows(x), _rows, (0,), (1,))
        stack = _stacked(w, x)
        return stack and Form("matmul", w, x, lambda mask: iter([stack(x)]), stack, (0, 1), (0, 2))
    w, x = input, other
    if w.ndim == 2 and x.ndim == 1:
        return Form("matmul", w, x, _plain_rows(x), _rows, (1,), (0,))
    if w.ndim == 2:
        return Form("matmul", w, x, lambda mask: iter([_rows(x.mT)]), lambda g: _rows(g.mT), (1,), (0,))
    stack = _stacked(w, x)
    return stack and Form("matmul", w, x, lambda mask: iter([stack(x.mT)]), lambda g: stack(g.mT), (0, 2), (0, 1))


def _stacked(w: Tensor, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """For a stack of matrices w (E, ·, ·): rows (R, E·D) from (…, E, R, D)."""
    if w.ndim != 3 or x.ndim < 3 or x.shape[-3] not in (1, len(w)):
        return None
    return lambda t: t.expand(*t.shape[:-3], len(w), *t.shape[-2:]).movedim(-3, -2).reshape(-1, len(w) * t.shape[-1])


def _addmm(
    is_weight: IsWeight,
    input: Tensor,
    mat1: Tensor | None = None,
    mat2: Tensor | None = None,
    *,
    batch1: Tensor | None = None,
    batch2: Tensor | None = None,
    **scales: Any,
) -> Form | None:
    mat1, mat2 = batch1 if mat1 is None else mat1, batch2 if mat2 is None else mat2  # `baddbmm` calls them batches
    if mat1 is None or is_weight(input) or scales.get("alpha", 1) != 1:
        return None
    return _matmul(is_weight, mat1, mat2)


def _einsum(is_weight: IsWeight, equation: str, *operands: Any, **named: Any) -> Form | None:
    operands = operands or tuple(named.get("operands", ()))
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    where = [i for i, tensor in enumerate(tensors) if is_weight(tensor)]
    if not isinstance(equation, str) or len(where) != 1 or len(tensors) < 2:
        return None
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    out = out if arrow else _implicit(terms)
    letters = terms.pop(where[0])
    weight = tensors.pop(where[0])
    others = "".join(terms)
    if "." in letters or len(set(letters)) < len(letters) or not set(letters) <= set(others) | set(out):
        return None
    inside, outside = [c for c in letters if c in others], [c for c in letters if c in out]
    batch = "".join(c for c in out if c not in letters)
    to_inputs = f"{','.join(terms)}->{batch}{''.join(inside)}"
    to_outputs = f"{out}->{batch}{''.join(outside)}"
    num_in, num_out = (_product(weight, letters, names) for names in (inside, outside))
    return Form(
        "einsum",
        weight,
        tensors[0],
        lambda mask: iter([torch.einsum(to_inputs, *(t.detach() for t in tensors)).reshape(-1, num_in)]),
        lambda grad: torch.einsum(to_outputs, grad).reshape(-1, num_out),
        tuple(map(letters.index, inside)),
        tuple(map(letters.index, outside)),
    )


def _implicit(terms: list[str]) -> str:
    """The output of an equation without an arrow: the ellipsis, then letters that occur once, in order."""
    joined = "".join(terms)
    once = sorted(c for c in set(joined) - {"."} if joined.count(c) == 1)
    return ("..." if "..." in joined else "") + "".join(once)


def _product(weight: Tensor, letters: str, names: list[str]) -> int:
    size = 1
    for name in names:
        size *= weight.shape[letters.index(name)]
    return size


def _embedding(
    is_weight: IsWeight, input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **options: Any
) -> Form | None:
    keep = None if padding_idx is None else (input != padding_idx % len(weight)).flatten()

    def inputs(mask: Tensor | None) -> Iterator[Tensor]:
        index = input.flatten()
        wanted = mask.flatten() if mask is not None and mask.shape == input.shape else None
        for part in (keep, wanted):
            index = index if part is None else index.masked_fill(~part, -1)
        yield index[index >= 0] if keep is not None or wanted is not None else index

    def outputs(grad: Tensor) -> Tensor:
        rows = _rows(grad)
        return rows if keep is None else rows[keep]

    return Form("embedding", weight, input, inputs, outputs, (0,), (1,), onehot=True)


def _embedding_bag(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Form | None:
    """A row for each lookup: the one-hot index, and the bag's gradient times the lookup's weight in the bag."""
    if mode == "max":
        return None
    index = input.flatten()
    if offsets is None:
        bags = torch.arange(len(input), device=index.device).repeat_interleave(input.shape[1])
        num_bags = len(input)
    else:
        num_bags = len(offsets) - include_last_offset
        places = torch.arange(len(index), device=index.device)
        bags = torch.searchsorted(offsets[:num_bags].contiguous(), places, right=True) - 1
    if padding_idx is not None:
        keep = index != padding_idx % len(weight)
        index, bags = index[keep], bags[keep]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights.flatten()[keep]
    shares = per_sample_weights.detach().flatten() if per_sample_weights is not None else None
    if mode == "mean":
        shares = 1.0 / torch.bincount(bags, minlength=num_bags).clamp_min(1)[bags].double()

    def outputs(grad: Tensor) -> Tensor:
        rows = grad[bags]
        return rows if shares is None else rows * shares.unsqueeze(-1).to(rows.dtype)

    return Form("embedding", weight, input, lambda mask: iter([index]), outputs, (0,), (1,), onehot=True)


def _bilinear(
    is_weight: IsWeight, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Form | None:
    """y_b = x₁ᵀ W_b x₂: the input of each W_b is x₂, and its output's gradient that of y_b times x₁."""
    left = _rows(input1.detach())

    def outputs(grad: Tensor) -> Tensor:
        return (_rows(grad).unsqueeze(-1) * left.unsqueeze(1)).flatten(1)

    return Form("bilinear", weight, input2, _plain_rows(input2), outputs, (2,), (0, 1))


def _convolution(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Form | None:
    num = weight.ndim - 2
    x = input if input.ndim == weight.ndim else input.unsqueeze(0)
    stride, dilation = _tuple(stride, num), _tuple(dilation, num)
    kernel = tuple(weight.shape[2:])
    pads = paddings(padding, kernel, dilation)
    short = groups == 1 and set(stride) == {1} and pays(x.shape, kernel, pads, dilation)
    return Form(
        "convolution",
        weight,
        input,
        lambda mask: chunks_of_windows(x.detach(), kernel, stride, pads, dilation),
        lambda grad: _rows((grad if grad.ndim == weight.ndim else grad.unsqueeze(0)).movedim(1, -1)),
        tuple(range(1, weight.ndim)),
        (0,),
        groups,
        moment=(lambda: moment_of_windows(x.detach(), kernel, pads, dilation)) if short else None,
    )


def _transposed_convolution(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Form | None:
    """The adjoint of a convolution: the inputs are pixels, and each belongs to a window of the output's gradient."""
    num = weight.ndim - 2
    x = input if input.ndim == weight.ndim else input.unsqueeze(0)
    stride, dilation, kernel = _tuple(stride, num), _tuple(dilation, num), tuple(weight.shape[2:])
    pads = paddings(_tuple(padding, num), kernel, dilation)

    def outputs(grad: Tensor) -> Tensor:
        grad = grad if grad.ndim == weight.ndim else grad.unsqueeze(0)
        found = windows(grad, kernel, stride, pads, dilation)
        for axis, size in enumerate(x.shape[2:]):  # positions that output_padding adds belong to no pixel
            found = found.narrow(axis + 1, 0, size)
        return found.flatten(0, num).flatten(1)

    inputs = _rows(x.movedim(1, -1))
    return Form(
        "convolution", weight, input, lambda mask: iter([inputs]), outputs, (0,), tuple(range(1, weight.ndim)), groups
    )


def _tuple(value: Any, num: int) -> tuple[int, ...]:
    return (value,) * num if isinstance(value, int) else tuple(value) * (num if len(value) == 1 else 1)


def _table() -> dict[Callable, Handler]:
    table: dict[Callable, Handler] = {
        F.linear: _linear,
        F.embedding: _embedding,
        F.embedding_bag: _embedding_bag,
        F.bilinear: _bilinear,
        torch.bilinear: _bilinear,
        torch.einsum: _einsum,
    }
    for name in ("matmul", "mm", "bmm", "__matmul__"):
        table |= {getattr(home, name): _matmul for home in (torch, Tensor) if hasattr(home, name)}
    table[Tensor.__rmatmul__] = lambda is_weight, input, other: _matmul(is_weight, other, input)
    for name in ("addmm", "baddbmm"):
        table |= {getattr(home, name): _addmm for home in (torch, Tensor)}
    for n in "123":
        table[getattr(F, f"conv{n}d")] = _convolution
        table[getattr(F, f"conv_transpose{n}d")] = _transposed_convolution
    return table


FORMS: dict[Callable, Handler] = _table()
"""For each function of torch that applies a weight, `handler(is_weight, *args, **kwargs) -> Form`, or `None` where the
call is not a product of a weight with rows."""
