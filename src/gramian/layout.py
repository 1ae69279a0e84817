"""Layouts: how a tensor holds its matrices, as an einops pattern that inverts bitwise."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import einops
import torch
from torch import Tensor

from gramian.errors import ShapeError

__all__ = ["Layout", "num_axes"]

# Axis names that are numbers: "i (three o) -> three o i".
_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}


@dataclass(frozen=True)
class Layout:
    """How a tensor holds its matrices: an einops pattern whose right side ends in rows and columns.

    `split` gives `(..., m, n)` and `join` inverts it bitwise: `layout.join(layout.split(t)) == t`. Fused matrices of
    unequal size (the queries, keys and values of grouped-query attention) are apart in `pieces`, cut by `rows`; `split`
    gives a stack of equal parts of them, several for a larger one.

    Args:
        pattern: `"i (three o) -> three o i"`. Number words (two … eight) are axes of that size.
        shape: of the tensor.
        sizes: of axes that the shape does not determine, by name.
        parts: names of the fused matrices, `("q", "k", "v")`; empty where they are only numbered.
        rows: where the fused matrices differ in size, the number of rows of each, over all rows of the stack.

    Raises:
        ShapeError: the pattern does not fit the shape; the error shows both.

    Cost: no arithmetic. `split` is a view where strides allow.
    Source: einops' notation (Rogozhnikov, ICLR 2022).

    >>> qkv = Layout("i (three o) -> three o i", (8, 24), parts=("q", "k", "v"))
    >>> qkv.matrices, qkv.labels
    ((3, 8, 8), ('q', 'k', 'v'))
    """

    pattern: str
    shape: tuple[int, ...]
    sizes: Mapping[str, Any] = field(default_factory=dict)  # from files and users: checked below, not by the type
    parts: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.pattern.count("->") != 1 or "..." in self.pattern:
            raise ShapeError(f"layout {self.pattern!r} must be 'axes -> axes', with every axis named: 'o i -> o i'")
        self._check_numbers()
        try:
            matrices = self.matrices
        except (einops.EinopsError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise ShapeError(f"layout {self.pattern!r} does not fit a tensor of shape {self.shape}: {reason}") from None
        if len(matrices) < 2:
            raise ShapeError(
                f"layout {self.pattern!r} turns shape {self.shape} into {matrices}; "
                "the right side must end in two axes, the rows and columns of a matrix"
            )
        if self.rows and (sum(self.rows) != math.prod(matrices[:-1]) or any(r % matrices[-2] for r in self.rows)):
            raise ShapeError(f"layout {self.pattern!r}: rows {self.rows} do not add up to those of {matrices}")
        if self.rows and self.parts and len(self.rows) != len(self.parts):
            raise ShapeError(f"layout {self.pattern!r}: {len(self.rows)} rows for {len(self.parts)} parts")

    def _check_numbers(self) -> None:
        """Raises for what einops would take, and keep in its cache, though it is no axis or no size."""
        words = re.findall(r"[^\s()]+", self.pattern.replace("->", " "))
        if bad := [word for word in words if not (word.isidentifier() or word == "1")]:
            raise ShapeError(f"layout {self.pattern!r}: {bad[0]!r} is not the name of an axis")
        names = re.findall(r"\w+", self.pattern.partition("->")[0])
        if len({name for name in names if name != "1"}) != len([name for name in names if name != "1"]):
            raise ShapeError(f"layout {self.pattern!r}: an axis stands twice on the left side")
        if "tensor" in names or "pattern" in names:
            raise ShapeError(f"layout {self.pattern!r}: 'tensor' and 'pattern' cannot be names of axes")
        for what, number in [*self.sizes.items(), *(("rows", number) for number in self.rows)]:
            if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 1 << 62:
                raise ShapeError(f"layout {self.pattern!r}: {what} must be whole numbers from 1 on, got {number!r:.40}")

    def split(self, tensor: Tensor) -> Tensor:
        """The matrices of `tensor` (shape `self.shape`) as one tensor `(..., m, n)`; a view where strides allow."""
        if self.is_identity:
            return tensor
        return einops.rearrange(tensor, self.pattern, **self._used_sizes)

    def join(self, matrices: Tensor) -> Tensor:
        """The tensor of shape `self.shape` that holds `matrices` (`(..., m, n)`)."""
        if self.is_identity:
            return matrices
        left, right = (side.strip() for side in self.pattern.split("->"))
        return einops.rearrange(matrices, f"{right} -> {left}", **self.axes)

    def pieces(self, tensor: Tensor, together: bool = False) -> Iterator[Tensor]:
        """Each matrix of `tensor` by itself, in the order of `labels`; or all of them as one, their rows in turn.

        Args:
            tensor: of shape `self.shape`.
            together: as one.
        """
        matrices = self.split(tensor)
        if together:
            yield matrices.flatten(0, -2)
        elif self.rows:
            yield from matrices.flatten(0, -2).split(self.rows)
        else:
            yield from matrices.flatten(0, -3) if matrices.ndim > 2 else matrices[None]

    def names(self, name: str, together: bool = False) -> tuple[str, ...]:
        """The names of the `pieces` of a tensor: its own, with the label in brackets where there are several.

        Args:
            name: the tensor's.
            together: as for `pieces`.
        """
        labels = ("",) if together else self.labels
        return (name,) if labels == ("",) else tuple(f"{name}[{label}]" for label in labels)

    @cached_property
    def matrices(self) -> tuple[int, ...]:
        """The shape `(..., m, n)` that `split` gives."""
        return tuple(self.split(torch.empty(self.shape, device="meta")).shape)

    def piece_shapes(self, together: bool = False) -> tuple[tuple[int, int], ...]:
        """The shape (m, n) of each of the `pieces`."""
        *leading, m, n = self.matrices
        if together:
            return ((math.prod(leading) * m, n),)
        return tuple((r, n) for r in self.rows) if self.rows else ((m, n),) * math.prod(leading)

    @property
    def labels(self) -> tuple[str, ...]:
        """What tells the `pieces` apart: `("q", "k", "v")`, `("0,gate", "0,up", …)`; `("",)` where there is one."""
        if self.rows:
            return self.parts or tuple(map(str, range(len(self.rows))))
        axes = self.sides[0]
        named = next((a for a in axes if a in _NUMBERS and self.axes[a] == len(self.parts)), None)
        named = axes[0] if named is None and len(axes) == 1 and self.axes[axes[0]] == len(self.parts) else named
        labels = [self.parts if axis == named else tuple(map(str, range(self.axes[axis]))) for axis in axes]
        return tuple(",".join(label) for label in itertools.product(*labels))

    @cached_property
    def dims(self) -> tuple[tuple[str, ...], ...]:
        """The names of the axes in each dimension of the tensor."""
        return tuple(_names_of(group) for group in _axes_of(self.pattern.partition("->")[0]))

    @cached_property
    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The names of the axes that count the matrices, that make up their rows, and their columns."""
        *leading, rows, columns = [_names_of(group) for group in _axes_of(self.pattern.partition("->")[2])]
        return sum(leading, ()), rows, columns

    @cached_property
    def is_identity(self) -> bool:
        """Whether the tensor is its own matrix, or stack of matrices."""
        left, _, right = self.pattern.partition("->")
        return left.split() == right.split() and "(" not in left and len(left.split()) == len(self.shape)

    @cached_property
    def _used_sizes(self) -> dict[str, int]:
        names = set(re.findall(r"\w+", self.pattern.partition("->")[0]))
        return {name: size for name, size in (_NUMBERS | dict(self.sizes)).items() if name in names}

    @cached_property
    def axes(self) -> dict[str, int]:
        """The size of every axis by name."""
        axes = dict(self._used_sizes)
        for names, size in zip(self.dims, self.shape, strict=True):
            unknown = [name for name in names if name not in axes]
            if unknown:
                known = math.prod(axes[name] for name in names if name in axes)
                axes[unknown[0]] = size // known if known else 0
        return axes


def num_axes(pattern: str) -> int:
    """The number of dimensions of the tensors that a pattern is for.

    Args:
        pattern: as in `Layout`.

    Returns:
        The number of axes on its left side, a group in parentheses being one.

    Raises: nothing of its own.
    Cost: none to speak of.
    Source: the definition.

    >>> num_axes("(g o) i w -> g o (i w)")
    3
    """
    return len(_axes_of(pattern.partition("->")[0]))


def _axes_of(side: str) -> list[str]:
    """The axes of one side of a pattern, each a name or a group in parentheses."""
    return re.findall(r"\([^)]*\)|\w+", side)


def _names_of(group: str) -> tuple[str, ...]:
    """The names in an axis or group; einops allows a 1, which is no axis."""
    return tuple(name for name in group.strip("()").split() if not name.isdigit())
