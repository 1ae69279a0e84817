"""Matrices of zeros behind which no output depends on the inputs, by experiment."""

from __future__ import annotations

from gramian.inspection.experiments.replaying import Asked
from gramian.inspection.experiments.unzeroed import drawn_anew

__all__ = ["blocking_zeros"]


def blocking_zeros(asked: Asked) -> tuple[str, ...] | None:
    """The matrices of zeros that alone keep all outputs from depending on the inputs; those that do together, if none.

    A matrix does so if the outputs ignore the inputs while all other zeros have random values. The outputs are compared
    bit by bit: a batch norm makes noise of the rounding of a constant, and dropout is off.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: their names; `None` where no matrix is zero, or the outputs depend on the inputs.
    Raises: what the model raises.
    Cost: where a matrix is zero, two forward passes of 16 samples; where the outputs ignore the inputs, two for each
        such matrix.
    Source: this library's own.
    """
    zeros = {n: p for n, p in asked.model.named_parameters() if p.ndim > 1 and p.numel() and not bool(p.any())}
    if not zeros or not asked.is_deaf:
        return None
    with drawn_anew(zeros.values()):
        if asked.ignores_inputs():
            return None  # and not because of these
    alone = []
    for name in zeros:
        with drawn_anew(p for n, p in zeros.items() if n != name):
            if asked.ignores_inputs():
                alone.append(name)
    return tuple(alone or zeros)
