"""Gradients that clipping has made so small that steps hardly change the weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from gramian.report import Finding

__all__ = ["LASTING", "Clipping"]

# A gradient is clipped that the step gets at most at this share of what the backward pass gave, the same for two
# parameters up to rounding.
CLIPPED, ALIKE = 0.1, 1e-2
# Looks in a row at which a gradient is clipped, from which on that is no spike.
LASTING = 3
# Under a loss scale each gradient that arrives is larger than the step's. One so small, and of one size up to this
# share at the last looks, is clipped all the same.
TINY, SAME = 1e-3, 1e-4
# Sizes of gradients, in ε of Adam, from which on a common factor of theirs does not matter.
FAR_FROM_EPS = 10.0


class Clipping:
    """Follows the size of the gradients at the steps that are looked at.

    Attributes:
        count: looks in a row at which they were clipped.
        is_narrow: whether a pass was computed in half precision, which a loss scale is for.
    """

    def __init__(self) -> None:
        self.count, self.is_narrow = 0, False
        self._sizes: deque[float] = deque(maxlen=LASTING)

    def judge(
        self,
        size: float,
        shares: Sequence[float],
        groups: Sequence[Mapping[str, Any]],
        sizes: Collection[float],
        step: int,
        *,
        scaled: bool,
    ) -> Iterator[Finding]:
        """The finding that little is left of the gradients.

        Args:
            size: of all gradients that the step gets, their norm.
            shares: of what arrived at two parameters, what their step gets; fewer where that is not known.
            groups: of the optimizer.
            sizes: root mean squares of the parameters' gradients.
            step: the number of steps that were taken before.
            scaled: whether the gradients are those of a loss times a scale, as they may be in half precision anyway.
        """
        self._sizes.append(size)
        before, self.count = self.count, 0
        if len(shares) < 2 or not 0.0 < max(shares) <= CLIPPED or min(shares) < (1 - ALIKE) * max(shares):
            return
        is_same = len(self._sizes) == LASTING and size <= TINY and max(self._sizes) - size <= SAME * size
        is_scaled = scaled or self.is_narrow
        if (is_scaled and not is_same) or _divide(groups, sizes):
            return
        self.count = before + 1
        made = size / max(shares)
        left = f"a gradient of norm {size:.1e}" if is_scaled else f"{max(shares):.1e} of the gradient"
        advice = "" if is_scaled else f"Clip at about {made:.1g}, or do not clip."
        if size <= TINY:
            advice = f"With a GradScaler, call scaler.unscale_(optimizer) before clipping. {advice}".strip()
        yield Finding(
            "gradient-clipped",
            "warning",
            f"Clipping leaves {left}",
            where="optimizer",
            evidence=f"the step gets a gradient of norm {size:.1e}, "
            + (
                f"as at the {LASTING - 1} looks before"
                if is_scaled
                else f"and the backward pass made one of {made:.1e}"
            )
            + f" (step {step + 1})",
            cause="The largest norm that clipping lets pass is far below that of usual gradients"
            + (", or gradients are clipped while they are multiplied by the loss scale" if size <= TINY else "")
            + (
                ", and what is left is near Adam's ε, which then divides the step."
                if any("betas" in group for group in groups)
                else ", and the step is as much smaller."
            ),
            advice=advice,
        )


def _divide(groups: Sequence[Mapping[str, Any]], sizes: Collection[float]) -> bool:
    """Whether the optimizer divides gradients by their size, as Adam does far from its ε: clipping is no harm."""
    largest = max(sizes, default=0.0)
    return bool(groups) and all(
        "betas" in group and largest > FAR_FROM_EPS * float(group.get("eps", 0.0) or 0.0) for group in groups
    )
