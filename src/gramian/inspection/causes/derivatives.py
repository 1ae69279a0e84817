"""Causes in derivatives that the loss takes on its way, as one of a differential equation does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gramian.inspection.causes.context import Context
from gramian.report import Finding

__all__ = ["RULES"]


def zero(context: Context) -> Iterator[Finding]:
    """Find derivatives that are zero everywhere, and not because a matrix starts at zero. Exact on the batch."""
    found = context.observed.zero_derivatives
    if not found or any(not bool(w.any()) for _, w in context.values()):
        return
    yield Finding(
        "derivative-zero",
        "error",
        f"A derivative that the loss takes is zero everywhere: that of its torch.autograd.grad number {found[0]}",
        where="loss",
        evidence="all its entries are exactly zero, and no matrix of the model is",
        cause="The function is constant, or linear, in what it is differentiated by: a ReLU has no second derivative, "
        "and a model without activations none either; or the output does not depend on that input.",
        advice="Use a smooth activation (tanh, sine, SiLU, GELU); look at what is differentiated by what.",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (zero,)
