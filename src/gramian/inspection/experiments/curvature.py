"""The leading eigenvalues of the loss's Hessian and Gauss–Newton matrix, and a rate of SGD beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gramian.errors import InputError
from gramian.inspection.measurements import Measured
from gramian.inspection.passes.signal import in_words
from gramian.linalg import eigvalsh_top_ex
from gramian.objective import Objective
from gramian.operators import Curvature, gauss_newton, hessian
from gramian.recording.measuring import batch_statistics

__all__ = ["CURVATURE", "measure_curvature"]

CURVATURE = "curvature"
COUNT = 5
RTOL = 1e-3
"""Three digits are shown; the rounding of float32 allows no more than five."""


def measure_curvature(
    measured: Measured,
    model: nn.Module,
    batches: list[Any],
    objective: Objective,
    optimizer: Optimizer | None,
    progress: Callable[[str, int, int], None],
) -> None:
    """Adds the eigenvalues to the facts, or says why there are none.

    Args:
        measured: gains facts, notes and what was looked at.
        model, batches, objective: as `inspect` has them; the loss is the mean over all batches.
        optimizer: the rate of a plain SGD is compared with the largest rate at which a step does not overshoot.
        progress: as for `inspect`.
    """
    progress(CURVATURE, 0, 2)
    try:
        with batch_statistics(model):
            top = _top(hessian(model, batches, objective), COUNT)
            measured.facts |= {f"Hessian λ{'₁₂₃₄₅'[i]}": value for i, value in enumerate(top)}
            progress(CURVATURE, 1, 2)
            try:
                measured.facts |= {"Gauss–Newton λ₁": _top(gauss_newton(model, batches, objective), 1)[0]}
            except InputError as error:  # a plain loss has no output apart from it
                measured.skipped |= {"Gauss–Newton matrix": in_words(error)}
    except Exception as error:  # no second derivative, NaN, or too many eigenvalues close together
        measured.skipped |= {CURVATURE: in_words(error)}
    else:
        measured.looked_at.append(CURVATURE)
        measured.notes.append(
            "Hessian eigenvalues are the largest in absolute value, of the mean loss over the batches that were looked "
            "at, without dropout and with the batches' own statistics in batch norms."
        )
        note = _rate(max(top), optimizer)
        if note:
            measured.notes.append(note)
    progress(CURVATURE, 2, 2)


def _top(curvature: Curvature, count: int) -> list[float]:
    value, certificate = eigvalsh_top_ex(curvature, min(count, curvature.shape[0]), rtol=RTOL)
    if not bool(certificate.converged):
        raise ArithmeticError(f"the eigenvalues did not converge: {certificate.reasons[0]}")
    return value.tolist()


def _rate(sharpness: float, optimizer: Optimizer | None) -> str | None:
    """The rate of a plain SGD beside 2 (1 + μ) / λ₁, above which gradient descent on a parabola grows."""
    if type(optimizer) is not torch.optim.SGD or sharpness <= 0:
        return None
    settings = {(float(g["lr"]), g["momentum"], g["dampening"], g["nesterov"]) for g in optimizer.param_groups}
    if len(settings) != 1:
        return None
    lr, momentum, dampening, nesterov = settings.pop()
    if dampening or nesterov:
        return None
    most = 2 * (1 + momentum) / sharpness
    formula = f"2 (1 + {momentum:g}) / λ" if momentum else "2 / λ"
    side = "above" if lr > most else "below"
    return (
        f"The rate {lr:.3g} is {side} {formula} = {most:.3g}, λ being the largest Hessian eigenvalue. Above it, steps "
        "along that direction grow, until the network moves to where λ is smaller or the loss diverges (Cohen et al., "
        "arXiv:2103.00065)."
    )
