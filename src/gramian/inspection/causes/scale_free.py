"""A cause in weights in front of a norm: their size is hidden, and makes their steps small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.inspection.causes.sizes import LARGEST, RATIO, sized_matrices, usual_size
from gramian.report import Action, Finding

__all__ = ["RULES"]


def in_front_of_norms(context: Context) -> Iterator[Finding]:
    """Find weights whose scale a norm takes off again, and that are so large that steps hardly turn them.

    Where an optimizer was given, its first step on a copy is asked: one whose steps grow with the weights turns them as
    much as others. Where none was, weights that look trained are left out, as they grow by their steps.
    """
    sized = sized_matrices(context)
    if len(sized) < 2 or context.has_learned:
        return
    usual, changes = usual_size(sized), context.steps.changes if context.steps is not None else {}
    ends = context.observed.branch_ends  # behind these a norm divides a sum
    hidden = [(b, s) for b, s in sized if context.is_normed(b) and context.module_of(b.name) not in ends]
    large = [(b, s) for b, s in hidden if s > max(LARGEST, RATIO * usual)]
    others = [change for name, change in changes.items() if all(name != b.name for b, _ in large)]
    if changes:
        large = [(b, s) for b, s in large if others and changes.get(b.name, 1.0) * RATIO < median(others)]
    else:
        large = [(b, s) for b, s in large if b.name not in context.trained]
    if not large:
        return
    block, size = max(large, key=lambda one: one[1])
    yield Finding(
        "parameter-scale-large",
        "warning",
        f"{block.name} is {size / usual:.3g} times as large as is usual, which the norm behind it hides",
        where=some([b.name for b, _ in large], SHOWN),
        evidence=f"root mean square of the weights × √fan_in = {size:.3g}; median of the layers {usual:.3g}"
        + (
            f"; the optimizer's first step changes it by {changes[block.name]:.1e} of its size, and the median of the "
            f"others by {median(others):.1e}"
            if changes
            else ""
        ),
        cause="The output is the same for any scale of these weights, and their gradient is inverse to it: a step "
        "turns them so little that they stay as they were drawn.",
        action=Action("rescale", {"name": block.name, "factor": float(f"{usual / size:.3g}")}),
        source="van Laarhoven 1706.05350",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (in_front_of_norms,)
