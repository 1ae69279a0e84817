"""The target of a compression: a size, a floor of quality or a speed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from gramian.compression.budget.plan import check_budget
from gramian.errors import InputError

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """What is asked of a compression: one of these, or `keep` with `bits`.

    Args:
        keep: share of all the model's parameters.
        max_drop: by how much the held-out measure may become worse, in its own unit.
        speedup: how many times as fast a forward pass must be, at batch 1 and at the larger batch.
        size: share of all the model's bytes.
        bits: of every layer's integers, 2 to 8.
        sparsity: share of the weights that become zero, or a pattern, `"2:4"`.
        by: what `max_drop` makes small: "parameters", by ranks alone, or "bytes", by all forms.
        narrow: whether heads, units and channels are removed, as by `gm.narrow`, in place of cutting ranks.
    """

    keep: float | None = None
    max_drop: float | None = None
    speedup: float | None = None
    size: float | None = None
    bits: int | None = None
    sparsity: float | str | None = None
    by: Literal["parameters", "bytes"] = "parameters"
    narrow: bool = False

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("keep", "max_drop", "speedup", "size", "bits", "sparsity")}
        asked = [name for name, value in given.items() if value is not None]
        if len(asked) != 1 and asked != ["keep", "bits"]:
            raise InputError(
                "compress: give one of keep, max_drop, speedup, size, bits and sparsity, or keep with bits; "
                f"got {' and '.join(asked) or 'none'}"
            )
        check_budget(self.keep, self.size, self.bits, self.sparsity)
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise InputError(f"compress: max_drop must be a number of at least 0, got {self.max_drop:g}")
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise InputError(f"compress: speedup must be above 1, got {self.speedup:g}")
        if self.by == "bytes" and self.max_drop is None:
            raise InputError("compress: by='bytes' says what max_drop makes small; give max_drop, or size in its place")
        wrong = [name for name in asked if name not in ("keep", "max_drop", "speedup")]
        if self.narrow and (wrong or self.by == "bytes"):
            raise InputError(
                f"compress: narrow takes keep, max_drop or speedup, and not {' and '.join(wrong) or 'by bytes'}. "
                "Narrow first, and compress the narrower model in a second run"
            )

    def __str__(self) -> str:
        text = self._text()
        return f"{text}, by fewer heads, units and channels" if self.narrow else text

    def _text(self) -> str:
        if self.keep is not None:
            return f"keep {self.keep:.0%} of the parameters{f', in {self.bits} bits' if self.bits else ''}"
        if self.max_drop is not None:
            return f"lose at most {self.max_drop:g}{'' if self.by == 'parameters' else ' in the fewest bytes'}"
        if self.size is not None:
            return f"keep {self.size:.0%} of the bytes"
        if self.bits is not None:
            return f"{self.bits} bits"
        return f"{self.sparsity} zeros" if self.sparsity is not None else f"{self.speedup:g}× as fast"

    @property
    def options(self) -> dict[str, Any]:
        """What `Plan.at` is asked for, where nothing has to be searched."""
        given = {name: getattr(self, name) for name in ("keep", "size", "bits", "sparsity")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def budget(self) -> str:
        """What the shares of the search and the curve are of: "keep" of the parameters, "size" of the bytes."""
        return "size" if self.size is not None or self.by == "bytes" else "keep"
