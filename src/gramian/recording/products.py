"""How products of rows with a weight are read: `linear`, `matmul` and its kin, `einsum`, `tensordot`, chains."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gramian.recording.form import Form, IsWeight, rows_of

__all__ = ["addbmm", "addmm", "bilinear", "chain", "einsum", "grouped", "linear", "matmul", "tensordot"]


def _plain_rows(x: Tensor) -> Callable[[Tensor | None], Iterator[Tensor]]:
    """The rows of x (…, D) where a mask over its leading dimensions, or over its rows (flat tokens), is true."""

    def rows(mask: Tensor | None) -> Iterator[Tensor]:
        if mask is not None and x.ndim == 2 and len(x) == mask.numel():
            mask = mask.flatten()
        dense = x if x.layout == torch.strided else x.to_dense()
        yield rows_of(dense) if not _covers(mask, dense) else rows_of(dense[mask])

    return rows


def _covers(mask: Tensor | None, x: Tensor) -> bool:
    return mask is not None and x.ndim > mask.ndim and x.shape[: mask.ndim] == mask.shape


def linear(is_weight: IsWeight, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Form | None:
    """The products of all vectors along the last dimensions of two tensors: `linear`, `inner`."""
    if is_weight(weight):
        return (
            Form("linear", weight, input, _plain_rows(input), rows_of, (1,), (0,), follows_mask=True)
            if weight.ndim == 2
            else None
        )
    if not is_weight(input) or input.ndim != 2:
        return None
    return Form(
        "linear", input, weight, _plain_rows(weight), lambda g: rows_of(g.movedim(0, -1)), (1,), (0,), follows_mask=True
    )


def matmul(is_weight: IsWeight, input: Tensor, other: Tensor) -> Form | None:
    if is_weight(other):
        return _from_right(other, input)
    return _from_left(input, other) if is_weight(input) else None


def _from_right(w: Tensor, x: Tensor) -> Form | None:
    """x W, of a matrix or a stack of them."""
    if w.ndim == 2:
        return Form("matmul", w, x, _plain_rows(x), rows_of, (0,), (1,), follows_mask=True)
    if w.ndim != 3:
        return None
    if x.ndim <= 2:  # every matrix of the stack takes the same rows
        stack = _stacked(w, 1 if x.ndim == 1 else None)
        return Form("matmul", w, x, _plain_rows(x), stack, (1,), (0, 2), follows_mask=True)
    stack = _stacked(w)
    return Form("matmul", w, x, lambda mask: iter([stack(x)]), stack, (0, 1), (0, 2)) if _fits(w, x) else None


def _from_left(w: Tensor, x: Tensor) -> Form | None:
    """W x, of a matrix or a stack of them: the rows run along the last dimension but one."""
    if w.ndim == 2 and x.ndim == 1:
        return Form("matmul", w, x, _plain_rows(x), rows_of, (1,), (0,))
    if w.ndim == 2:
        return Form("matmul", w, x, lambda mask: iter([rows_of(x.mT)]), lambda g: rows_of(g.mT), (1,), (0,))
    if w.ndim != 3:
        return None
    if x.ndim == 1:
        return Form("matmul", w, x, _plain_rows(x), _stacked(w, 1), (2,), (0, 1))
    stack = _stacked(w)
    if x.ndim == 2:
        return Form("matmul", w, x, lambda mask: iter([x.mT]), lambda g: stack(g.mT), (2,), (0, 1))
    if not _fits(w, x):
        return None
    return Form("matmul", w, x, lambda mask: iter([stack(x.mT)]), lambda g: stack(g.mT), (0, 2), (0, 1))


def _fits(w: Tensor, x: Tensor) -> bool:
    """Whether the dimension of x (…, E, R, D) before the last two is that of a stack w (E, ·, ·)."""
    return len(w) == 1 or x.shape[-3] in (1, len(w))


def _stacked(w: Tensor, missing: int | None = None) -> Callable[[Tensor], Tensor]:
    """For a stack of matrices w (E, ·, ·): rows (R, E·D) from (…, E, R, D), or from (…, E, D) where R is missing."""

    def rows(t: Tensor) -> Tensor:
        t = t if missing is None else t.unsqueeze(-2)
        if len(w) == 1:
            return rows_of(t)
        t = t.expand(*t.shape[:-3], len(w), *t.shape[-2:])
        return t.movedim(-3, -2).reshape(-1, len(w) * t.shape[-1])

    return rows


def addmm(
    is_weight: IsWeight, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float | int = 1, alpha: float | int = 1
) -> Form | None:
    """β · input + α · mat1 mat2, for stacks too: the gradient at the product is α times that at the output."""
    return _times(matmul(is_weight, mat1, mat2), alpha)


def addbmm(
    is_weight: IsWeight, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float | int = 1, alpha: float | int = 1
) -> Form | None:
    """A sum over the products of a stack: each product has the whole gradient."""
    found = matmul(is_weight, mat1, mat2)
    if found is None:
        return None
    outputs = found.outputs
    return _times(replace(found, outputs=lambda g: outputs(g.expand(len(mat1), *g.shape))), alpha)


def _times(form: Form | None, alpha: float | int) -> Form | None:
    if form is None or alpha == 1:
        return form
    outputs = form.outputs
    return replace(form, outputs=lambda g: alpha * outputs(g))


def grouped(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: Any = None,
) -> Form | None:
    """`grouped_mm`: rows (S, D) sorted by expert, of which those of expert e end at `offs[e]`, times w (E, D, ·)."""
    if not is_weight(weight) or weight.ndim != 3:
        return None
    if offs is None:
        return matmul(is_weight, input, weight)
    if input.ndim != 2:
        return None
    places = torch.arange(len(input), device=offs.device, dtype=offs.dtype)
    owners = torch.searchsorted(offs, places, right=True)
    owners = owners.masked_fill(owners == len(weight), -1)
    return Form("matmul", weight, input, lambda mask: iter([input]), lambda g: g, (1,), (2,), owners=owners)


def chain(is_weight: IsWeight, matrices: Sequence[Tensor]) -> list[Form]:
    """A product of several matrices, L W R for each weight W: one side is made of data, and the other of weights."""
    known = [is_weight(t) for t in matrices]
    found = []
    for k, w in enumerate(matrices):
        if not known[k] or w.ndim != 2:
            continue
        left, right = list(matrices[:k]), list(matrices[k + 1 :])
        if left and all(known[k + 1 :]):
            rows = _product(left)
            form = Form("matmul", w, rows, _plain_rows(rows), rows_of, (0,), (1,), follows_mask=True)
            found.append(replace(form, outputs=lambda g, r=right: rows_of(_product([g, *(t.mT for t in r[::-1])]))))
        elif right and all(known[:k]):
            rows = _product(right).T
            form = Form("matmul", w, rows, _plain_rows(rows), rows_of, (1,), (0,))
            found.append(replace(form, outputs=lambda g, ts=left: rows_of(_product([*(t.mT for t in ts[::-1]), g]).mT)))
    return found


def _product(matrices: Sequence[Tensor]) -> Tensor:
    """The product of matrices, of which a first or last one may be a vector: a row, or a column."""
    tensors = [t.detach() for t in matrices]
    tensors[0] = tensors[0].unsqueeze(0) if tensors[0].ndim == 1 else tensors[0]
    tensors[-1] = tensors[-1].unsqueeze(1) if tensors[-1].ndim == 1 else tensors[-1]
    total = tensors[0]
    for t in tensors[1:]:
        total = total.to(t.dtype) @ t
    return total


def einsum(is_weight: IsWeight, equation: str, operands: Sequence[Any]) -> Form | None:
    tensors = list(operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands)
    where = [i for i, tensor in enumerate(tensors) if is_weight(tensor)]
    if len(where) != 1 or len(tensors) < 2:
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
    num_in, num_out = (math.prod(weight.shape[letters.index(name)] for name in names) for names in (inside, outside))
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


def tensordot(is_weight: IsWeight, input: Tensor, other: Tensor, dims: Any = 2) -> Form | None:
    """The products of two tensors, summed over the dimensions that `dims` pairs."""
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = [range(input.ndim - dims, input.ndim), range(dims)]
    ours, theirs = ([dims] if isinstance(dims, int) else list(dims) for dims in dims)
    letters = list(string.ascii_letters)
    one = [letters.pop() for _ in range(input.ndim)]
    two = [letters.pop() for _ in range(other.ndim)]
    for i, j in zip(ours, theirs, strict=True):
        two[j] = one[i]
    out = [c for c in one if c not in two] + [c for c in two if c not in one]
    found = einsum(is_weight, f"{''.join(one)},{''.join(two)}->{''.join(out)}", (input, other))
    return found and replace(found, op="tensordot")


def bilinear(
    is_weight: IsWeight, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Form | None:
    """y_b = x₁ᵀ W_b x₂: the input of each W_b is x₂, and its output's gradient that of y_b times x₁."""
    left = rows_of(input1.detach())

    def outputs(grad: Tensor) -> Tensor:
        return (rows_of(grad).unsqueeze(-1) * left.unsqueeze(1)).flatten(1)

    return Form("bilinear", weight, input2, _plain_rows(input2), outputs, (2,), (0, 1), follows_mask=True)
