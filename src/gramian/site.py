"""Sites: the uses of a block in the forward pass, with the second moments on both of its sides."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor

from gramian.errors import InputError
from gramian.gram import DiagonalGram, Gram

__all__ = ["Site", "Sites"]


@dataclass
class Site:
    """One use of a block in the forward pass, with the second moments of its inputs and output gradients.

    Where the block holds several matrices, A or G is a batch with an entry for each if they differ, and a single one if
    they do not: the heads of an output projection have an A each and one G.

    Attributes:
        A: the second moment of the inputs, `(1/rows) Σ a aᵀ` over rows (samples, tokens, patches); or `None`.
        G: that of the gradients of the loss at the outputs, `(1/units) Σ g gᵀ` over the loss's units; or `None`.
        reason: why A or G is `None`.
        calls: how often this use was seen.
        name: the parameter's name where it was used.
        op: the operation: "linear", "matmul", "convolution", ...
        transposed: whether the input runs along the block's rows, as in an embedding (rows: the vocabulary).
        skipped: the units of backward passes that overflowed and were left out of G, or `None`.
    """

    A: Gram | DiagonalGram | None = None
    G: Gram | DiagonalGram | None = None
    reason: str = ""
    calls: int = 0
    name: str = ""
    op: str = ""
    transposed: bool = False
    skipped: Tensor | None = None

    @property
    def key(self) -> tuple:
        """Equal for two sites that are the same use of a block."""
        return self.name, self.op, self.transposed, None if self.A is None else self.A.batch

    def merge(self, other: Site) -> None:
        """Adds the second moments of the same use on other batches."""
        for side in "AG":
            mine, theirs = getattr(self, side), getattr(other, side)
            if mine is not None and theirs is not None:
                mine.merge(theirs)
            elif theirs is not None:
                setattr(self, side, copy.deepcopy(theirs))
        if other.op and not self.op:
            self.name, self.op, self.transposed, self.reason = other.name, other.op, other.transposed, ""
        self.calls += other.calls
        self.reason = "" if self.G is not None else self.reason or other.reason
        if other.skipped is not None:
            self.skipped = other.skipped + (0.0 if self.skipped is None else self.skipped)


class Sites(tuple[Site, ...]):
    """The sites of one block, a tuple; `A`, `G` and `reason` are those of its only site.

    It is made from any iterable of `Site`.

    Raises:
        InputError: `A`, `G`, `reason` or `only` where the block has several sites.
    Cost: none.
    Source: this library's own.

    >>> Sites([Site(reason="no batch reached it")]).reason
    'no batch reached it'
    """

    __slots__ = ()

    @property
    def A(self) -> Gram | DiagonalGram | None:
        """The second moment of the inputs of the only site."""
        return self.only.A

    @property
    def G(self) -> Gram | DiagonalGram | None:
        """The second moment of the output gradients of the only site."""
        return self.only.G

    @property
    def reason(self) -> str:
        """Why A or G is `None`, at the only site."""
        return self.only.reason

    @property
    def calls(self) -> int:
        """How often the block was used, at all sites."""
        return sum(site.calls for site in self)

    @property
    def only(self) -> Site:
        """The block's only site. Raises an `InputError` that lists the sites where there are several."""
        if len(self) != 1:
            shown = ", ".join(f"[{i}] {s.op} as {s.name}" for i, s in enumerate(self))
            raise InputError(f"statistics: {self[0].name!r} has {len(self)} sites: {shown}. Choose one by its number")
        return self[0]

    def __repr__(self) -> str:
        return f"Sites({list(self)!r})"
