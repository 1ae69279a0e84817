"""A cause in adapters: a scale by which what is trained counts for nothing, or for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.report import Finding

__all__ = ["RULES"]

# Change of the outputs in a step of 1e-4, as a share of what differs between samples: below the first, a million steps
# are too few; above the second, four steps replace all that the frozen network says.
NOTHING, EVERYTHING = 1e-6, 0.25


def adapter_scale(context: Context) -> Iterator[Finding]:
    """Find adapters whose steps have no effect on the outputs, or too large a one. Measured on a copy."""
    moved, seen = context.moved_by_steps, context.observed
    arriving = [n for n, size in seen.gradients.items() if size]
    if moved is None or not arriving or context.zeroed or (context.opening and context.opening.shut):
        return
    if NOTHING <= moved <= EVERYTHING:
        return
    owners = list(dict.fromkeys(context.module_of(n) or n for n in seen.gradients))
    small = moved < NOTHING
    yield Finding(
        "adapter-scale",
        "error",
        f"What is trained beside the frozen network changes its outputs by {moved:.1g} of their differences in a step",
        where=some(owners, SHOWN),
        evidence="three steps of 1e-4 along the signs of the gradients, on a copy: outputs of 16 samples change by "
        f"{moved:.2g} of what differs between samples in each; LoRA with α/r of 1 or 2 gives 1e-4 to 1e-1 (measured)",
        cause=f"The factor of the adapters (α/r of LoRA) is wrong by decades: {'too small' if small else 'too large'}.",
        advice="Set α to r or 2 r, and look at what else multiplies the adapter's output.",
        source="Hu et al. 2106.09685, §4.1",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (adapter_scale,)
