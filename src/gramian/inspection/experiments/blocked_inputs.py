"""Whether outputs depend on the inputs at all, and matrices of zeros behind which none does, by experiment."""

from __future__ import annotations

from gramian.inspection.experiments.filled_zeros import drawn_anew
from gramian.inspection.experiments.replay import Asked

__all__ = ["EQUAL", "are_constant", "blocking_zeros"]

EQUAL = 1e-6
"""Outputs count as equal for all samples below this share of their size, a few roundings of float32."""


def are_constant(asked: Asked) -> bool:
    """Whether all samples get the same outputs in evaluation mode, in which dropout behind what is shut adds nothing.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: false too where outputs are not by sample.
    Cost: none beside the replay's.
    """
    outputs = asked.replay.outputs
    num = {len(t) if t.ndim else 1 for t in outputs}
    if not asked.replay.is_known or len(num) != 1 or num.pop() < 2:
        return False
    return all(float((t - t[0]).float().abs().amax()) <= EQUAL * float(t.float().abs().amax()) for t in outputs)


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
