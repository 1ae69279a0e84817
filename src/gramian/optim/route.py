"""How one parameter is stepped, and why."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from gramian.block import Layout
from gramian.layers.lookup import is_lazy
from gramian.layers.roles import Role
from gramian.optim.parts import in_parts

__all__ = ["Direction", "Group", "Route"]

Direction = Literal["matrix", "adamw"]


@dataclass(frozen=True, eq=False)
class Route:
    """How one parameter is stepped, and why: as the matrices of `layout`, or by AdamW where that is `None`.

    `whole` is the layout before large matrices were cut into parts; where a parameter steps by AdamW for its role, the
    layout of the matrices that it holds. `role` is the block's in the model. `shape` is the parameter's at the start.
    A parameter that is not `named` is called by its number.
    """

    name: str
    parameter: Tensor
    layout: Layout | None
    reason: str
    whole: Layout | None = None
    role: Role = "hidden"
    named: bool = True
    shape: tuple[int, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        shape = None if is_lazy(self.parameter) else tuple(self.parameter.shape)
        object.__setattr__(self, "shape", shape)

    @property
    def direction(self) -> Direction:
        """`"matrix"` or `"adamw"`."""
        return "adamw" if self.layout is None else "matrix"

    @property
    def matrices(self) -> tuple[int, ...]:
        """The shape `(..., m, n)` of the whole matrices."""
        layout = self.whole or self.layout
        assert layout is not None
        return layout.matrices

    def cut(self, size: int | None) -> Route:
        """The same route with large matrices in parts, of at most `size` on the smaller side."""
        if self.layout is None:
            return self
        whole = self.whole or self.layout
        return replace(self, layout=in_parts(whole, size), whole=whole)


Group = tuple[list[Route], dict[str, Any]]
"""The routes of a parameter group, and the options of that group."""
