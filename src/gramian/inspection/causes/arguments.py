"""Causes in what the model makes of its arguments, and in outputs that are compared with its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gramian.errors import some
from gramian.inspection.causes.context import Context
from gramian.report import Finding

__all__ = ["RULES"]


def unheard(context: Context) -> Iterator[Finding]:
    """Find arguments that change no output, also where the loss takes what is in them. Exact."""
    found = context.probes.unheard
    if not found or context.probes.without_effect.names or context.has_constant_output:
        return
    yield Finding(
        "input-unused",
        "warning",
        f"The model is called with {some(found)}, and does not use {'it' if len(found) == 1 else 'them'}",
        where="data",
        evidence="with the values of other samples in its place, all outputs are the same to the last bit, also where "
        "zero parameters get other values; other arguments have an effect (exact)",
        cause="What is computed of it is not passed on, or is multiplied by zero.",
        advice="Use it in the forward pass, or do not pass it.",
    )


def inverted(context: Context) -> Iterator[Finding]:
    """Find masks that leave padding alone. Exact."""
    found = context.probes.inverted
    if found is None:
        return
    name, mask, num = found
    yield Finding(
        "padding-read",
        "error",
        f"The model reads {name} where it is padding, and nowhere else: {mask} is taken the wrong way round",
        where=f"data, {name}",
        evidence=f"of the first samples {num} have padding, zeros where {mask} is zero; other values there change the "
        "outputs, and other values elsewhere change no bit (exact)",
        cause="The model multiplies by one minus the mask, or takes ones for what is to be hidden.",
        advice="Turn the mask round: ones, or True, at what counts, or the reverse, as the model takes it.",
    )


def taught(context: Context) -> Iterator[Finding]:
    """Find probabilities that are compared with the network's own, which have a gradient. Exact."""
    if context.observed.num_taught != 1:  # two are each other's, on purpose
        return
    yield Finding(
        "target-not-detached",
        "warning",
        "Probabilities are compared with the network's own, which have a gradient",
        where="loss",
        evidence="the loss takes as its target what the same parameters make of other inputs, and gradients go to "
        "both (exact)",
        cause="The target moves towards the output as well, so that both may become the same for all inputs.",
        advice="Compute the target under torch.no_grad(), or with a teacher's own parameters.",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (unheard, inverted, taught)
