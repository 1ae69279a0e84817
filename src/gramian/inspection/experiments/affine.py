"""Whether a network is one affine map, up to the function at its end."""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.batch import main_input, mapped
from gramian.inspection.experiments.replay import Asked, are_equal, outputs_of
from gramian.inspection.passes.batch_roles import given_of
from gramian.inspection.passes.records import Ends
from gramian.inspection.passes.step_records import Observed

__all__ = ["is_affine"]

# Shares of a range nearer than this to its ends say too little about what was mapped there.
EDGE = 1e-3


def is_affine(asked: Asked) -> bool | None:
    """Whether a mixture of inputs gives the mixture of outputs, where several matrices are used one after another.

    A sigmoid, tanh or softmax at the end is undone first.

    Args:
        asked: the model, left as it was.

    Returns: that; `None` where it cannot be told.
    Raises: what the model raises.
    Cost: two forward passes.
    """
    seen = asked.seen
    fed = [g for g in given_of(seen.batches[:1], seen.fed, set()) if g.is_input]
    matrices = [n for n, p in asked.model.named_parameters() if p.ndim > 1 and n in seen.used]
    if len(fed) != 1 or len(matrices) < 2 or not fed[0].values[0].is_floating_point():
        return None
    if _has_functions(seen):
        return None
    x = main_input(asked.batch)
    if len(x) < 3 or x.shape != fed[0].values[0][: len(x)].shape:
        return None
    mixture = 0.3 * x + 0.7 * x.roll(1, 0)
    with torch.no_grad():
        whole = asked.replay.single
        mixed = outputs_of(asked, mapped(asked.batch, lambda t: mixture if t is x else t))
    if whole is None or mixed is None or whole.ndim < 1 or len(whole) != len(x):
        return None
    before = [_before(t, seen.ends) for t in (whole, mixed)]
    if before[0] is None or before[1] is None:
        return None
    return are_equal(before[1], 0.3 * before[0] + 0.7 * before[0].roll(1, 0))


def _has_functions(seen: Observed) -> bool:
    """Whether activations or gates stand between layers: at the start, zeros or mirrored weights may hide them."""
    last = max(seen.used.values(), default=0)
    return bool(seen.attentions or seen.gates) or any(a.order < last for a in seen.activations)


def _before(output: Tensor, ends: Ends | None) -> Tensor | None:
    """What the function at the end was given, up to a factor and an offset; `None` where that is lost."""
    if ends is None:
        return output
    share = (output.double() - ends.low) / (ends.high - ends.low)
    if ends.function not in ("sigmoid", "tanh", "softmax") or not bool(((share > EDGE) & (share < 1 - EDGE)).all()):
        return None
    if ends.function != "softmax":
        return share.logit()
    logs = share.log()
    return logs - logs.mean(-1, keepdim=True) if bool((share.sum(-1) - 1).abs().max() < EDGE) else None
