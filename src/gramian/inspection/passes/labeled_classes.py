"""Which classes of the labels have a gradient: none has one that a weight of zero or `ignore_index` leaves out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gramian.inspection.passes.step_records import Observed

__all__ = ["see_labels"]


def see_labels(seen: Observed, scores: Tensor, target: Tensor, *, is_log: bool) -> None:
    """Keeps, in the backward pass, the classes of which no unit has a gradient, where others do.

    Args:
        seen: gets them, of the first such loss.
        scores: (N, C, …), or (C,), with a gradient.
        target: (N, …) classes.
        is_log: whether the scores are log-probabilities.
    """
    axis = min(1, scores.ndim - 1)
    if seen.criteria[0].given.data_ptr() != scores.data_ptr() or target.numel() * scores.shape[axis] != scores.numel():
        return
    values, labels = scores.detach().movedim(axis, -1).flatten(0, -2), target.detach().flatten()

    def keep(gradient: Tensor) -> None:
        reached = gradient.movedim(axis, -1).flatten(0, -2).ne(0).any(-1)
        found = {}
        for label in labels[~reached].unique().tolist():
            own = labels == label
            if 0 <= label < values.shape[-1] and not bool(reached[own].any()):
                loss = (F.nll_loss if is_log else F.cross_entropy)(values[own].float(), labels[own])
                found[label] = (int(own.sum()), target.ndim, float(loss))
        seen.ungraded_labels = found if bool(reached.any()) else {}

    scores.register_hook(keep)
