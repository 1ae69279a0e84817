"""Classes of labels that a loss of one's own leaves out, as with weights of zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import given_of

__all__ = ["Ignored", "ignored_classes"]

# Samples of the classes that count, and of those that do not, that are enough.
LEAST = 3
# A gradient's sum over the classes that is rounding, as a share of its largest entry.
EQUAL = 1e-3


@dataclass(frozen=True)
class Ignored:
    """Classes whose samples have no effect on the loss, and how many samples that are of how many."""

    label: str
    classes: tuple[int, ...]
    silent: int
    num: int


def ignored_classes(asked: Asked) -> Ignored | None:
    """Look for samples whose scores have no effect, where all those of some classes have none.

    That the labels are those of the scores is seen by the others: their gradient is negative for the score of the
    label, positive for all others, and sums to zero.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: an `Ignored`, or `None`.
    Raises: what the model raises.
    Cost: two evaluations of the loss where samples have no gradient.
    """
    replay = asked.replay
    if not replay.is_known or asked.seen.strangers:
        return None
    for one in given_of([asked.batch], set(), set()):
        t = one.values[0]
        if t.is_floating_point() or t.ndim != 1 or t.dtype == torch.bool:
            continue
        for i, out in enumerate(replay.outputs):
            if out.ndim != 2 or len(out) != len(t) or not out.shape[1] >= 2 or int(t.min()) < 0:
                continue
            if int(t.max()) >= out.shape[1]:
                continue
            g = replay.slopes[i].double()
            acts = g.ne(0).any(1)
            silent = set(t[~acts].tolist()) - set(t[acts].tolist())
            rows = torch.tensor([int(v) in silent for v in t])
            if int(acts.sum()) < LEAST or int(rows.sum()) < LEAST or not bool((rows == ~acts).all()):
                continue
            own = g[acts].gather(1, t[acts][:, None].long())
            others = g[acts].scatter(1, t[acts][:, None].long(), 0.0)
            are_scores = bool((own < 0).all()) and bool((others >= 0).all())
            if (
                are_scores
                and float(g.sum(1).abs().amax()) <= EQUAL * float(g.abs().amax())
                and _are_still(replay, i, rows)
            ):
                return Ignored(one.name, tuple(sorted(int(v) for v in silent)), int(rows.sum()), len(t))
    return None


def _are_still(replay: Replay, i: int, rows: torch.Tensor) -> bool:
    """Whether other scores for these samples, far in both directions, leave the loss as it is."""
    for by in (-30.0, 30.0):
        values = replay.outputs[i].clone()
        values[rows, ::2] += by
        if replay.value([*replay.outputs[:i], values, *replay.outputs[i + 1 :]]) != replay.here:
            return False
    return True
