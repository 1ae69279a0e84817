"""One use of a weight as `y = W x` on rows, and how the arguments of a call of torch are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gramian.gram import Sums

__all__ = ["Form", "IsWeight", "Row", "rows_of"]

IsWeight = Callable[[Any], bool]


@dataclass(frozen=True)
class Form:
    """One use of a weight.

    `inputs(mask)` yields the input rows (R, D) in chunks; D runs over the weight's dimensions `in_dims` in order.
    `outputs(grad)` gives the rows (R, D') of the output's gradient, over `out_dims`. A dimension in both (experts,
    groups) numbers a batch of products. `groups` > 1: dimension 0 of the weight starts with that many groups, which the
    other side has too. `onehot`: the input rows are given as indices. `source` is the tensor that the inputs come from.
    `moment`, where it exists, computes the inputs' sums faster than from their rows. So does `diagonals` for a moment's
    diagonal: that of the gradients where one is given, else that of the inputs. `owners` (R,), where dimension 0 is on
    neither side, says which of the matrices along it each row belongs to; −1 stands for none. `follows_mask` says that
    `inputs` leaves rows out by a mask over the leading dimensions of the source, or over its rows.
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
    diagonals: Callable[[Tensor | None], Sums] | None = None
    owners: Tensor | None = None
    follows_mask: bool = False


# What torch's own functions accept for some names, after NumPy.
_NUMPY = {"x": "input", "a": "input", "x1": "input", "x2": "other"}


class Row:
    """A row of the table of forms: the names of a function's arguments, and how a call of it is read.

    Args:
        arguments: the names that the function has for its arguments, in its order. Where the reader calls one
            otherwise, both names stand there, `"input mat2:other"`; a last `"*operands"` takes all the rest, as a
            tuple.
        reader: `reader(is_weight, ...) -> Form`, or several of them, or `None` where the call is not a product of a
            weight with rows.
    """

    def __init__(self, arguments: str, reader: Callable[..., Form | list[Form] | None]) -> None:
        pairs = [part.partition(":")[::2] for part in arguments.split()]
        self.reader = reader
        self.names = {
            theirs.strip("*"): (ours or theirs).strip("*") for theirs, ours in pairs
        }  # by the function's name
        self.is_variadic = arguments.rpartition(" ")[2].startswith("*")
        unknown = set(self.names.values()) - set(inspect.signature(reader).parameters)
        assert not unknown, f"{reader.__name__} takes no {unknown}"

    def bind(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call by the reader's names; `None` where the call has others."""
        if self.is_variadic:
            args = (*args[: len(self.names) - 1], tuple(args[len(self.names) - 1 :]))
        if len(args) > len(self.names):
            return None
        bound = dict(zip(self.names.values(), args, strict=False))
        for given, value in kwargs.items():
            if given == "out":
                continue
            name = self.names.get(given) or self.names.get(_NUMPY.get(given, ""))
            if name is None or name in bound:
                return None
            bound[name] = value
        return bound

    def read(self, is_weight: IsWeight, args: tuple, kwargs: Mapping[str, Any]) -> list[Form]:
        """The uses in a call; none where it is not a product, or is called in a way that the row does not know."""
        bound = self.bind(args, kwargs)
        try:
            found = None if bound is None else self.reader(is_weight, **bound)
        except Exception:
            # torch took the call and the reader did not understand it. The model must run all the same; the recorder
            # names the function as a use that is not captured.
            return []
        return found if isinstance(found, list) else [] if found is None else [found]


def rows_of(x: Tensor) -> Tensor:
    """The vectors along the last dimension of x (…, D), as rows (R, D)."""
    return x.reshape(-1, x.shape[-1])
