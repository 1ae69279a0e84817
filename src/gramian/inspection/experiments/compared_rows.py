"""Which outputs a sample's label or input is compared with: its own, another's alone, or all alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.prerequisites import is_by_sample
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import given_of
from gramian.inspection.passes.moments import all_finite

__all__ = ["Rows", "compared_rows"]

# Differences of gradients that are zero or equal up to rounding, as a share of the largest.
EQUAL = 1e-3
# Of a row that is not compared with a number at all, as a share of the largest row.
STILL = 1e-6
# Gradients that sums in another order make equal, as a share of the largest.
ORDER = 1e-4
# Samples that are looked at, and outputs from which on all alike are no chance.
SAMPLES, LEAST = (0, 2), 4
# How far a number is moved, in the largest of numbers and outputs, so that absolute values change their slope too.
FAR = 10.0


@dataclass(frozen=True)
class Rows:
    """What is wrong between samples.

    Attributes:
        kind: "shifted" (another sample's output is moved, and its own is not), "all" (all are, by the same, or
            whatever the order).
        label: the tensor, as Python reads it off a batch.
        rows: a sample, and the output that it moves; of "all" the shapes' lengths.
        shapes: of the tensor and of the output.
    """

    kind: str
    label: str
    rows: tuple[int, int]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


def compared_rows(asked: Asked) -> Rows | None:
    """Set the numbers of one sample to a small and a large value, and look whose outputs' gradients differ.

    A loss over one batch as a whole, as of ranks, correlations or contrasts, moves all outputs, but its own otherwise
    than the others.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: what is wrong, or `None`.
    Raises: what the model raises.
    Cost: two to four evaluations of the loss and its gradient for each tensor of numbers with a row for each sample.
    """
    replay = asked.replay
    if not replay.is_known or not replay.outputs or asked.seen.strangers:
        return None
    given = given_of([asked.batch], set(), set())
    for one in given:
        t = one.values[0]
        if not t.is_floating_point() or len(t) < LEAST or not all_finite(t):
            continue
        first = _moved(replay, t, SAMPLES[0])
        largest = max((float(moved.abs().amax()) for moved in first if moved is not None), default=0.0)
        for i, moved in enumerate(first):
            out = replay.outputs[i]
            if moved is None or len(moved) != len(t) or float(moved.abs().amax()) <= STILL * largest:
                continue
            shapes = (tuple(t.shape), tuple(out.shape))
            if _are_alike(moved):
                again = _moved(replay, t, SAMPLES[1])[i]
                if again is not None and _are_alike(again):
                    return Rows("all", one.name, (len(t), len(out)), shapes)
            if t.numel() == len(t) and _are_all_moved(moved) and _is_in_any_order(replay, i, t):
                return Rows("all", one.name, (len(t), len(out)), shapes)
            other = _alone(moved, SAMPLES[0])
            if other is not None:
                again = _moved(replay, t, SAMPLES[1])[i]
                if again is not None and _alone(again, SAMPLES[1]) is not None:
                    return Rows("shifted", one.name, (SAMPLES[0], other), shapes)
    return None


def _is_in_any_order(replay: Replay, i: int, t: Tensor) -> bool:
    """Whether numbers in another order give the same gradients, and each output's depends on no other output.

    A distance of distributions takes its samples in any order too, and there each output's depends on all.
    """
    if not is_by_sample(replay, i):
        return False
    for shift in (1, 3):
        batch = mapped(replay.batch, lambda v, shift=shift: v.roll(shift, 0) if v is t else v)
        runs = zip(replay.gradients(replay.outputs, batch), replay.slopes, strict=True)
        if not all(float((a - b).abs().amax()) <= ORDER * float(b.abs().amax()) for a, b in runs):
            return False
    return True


def _moved(replay: Replay, t: Tensor, sample: int) -> list[Tensor | None]:
    """By how much each output's rows of gradients differ between two values of a sample's numbers."""
    size = max(float(v.detach().abs().amax()) for v in (t, *replay.outputs) if v.numel())
    for low, high in ((-FAR * size, FAR * size), (float(t.min()), float(t.max()))):
        runs = []
        for value in (low, high):
            changed = t.clone()
            changed[sample] = value
            runs.append(
                replay.gradients(replay.outputs, mapped(replay.batch, lambda v, new=changed: new if v is t else v))
            )
        found = [two - one for one, two in zip(*runs, strict=True)]
        if all(bool(v.isfinite().all()) for v in found):
            return [v if v.ndim and bool(v.any()) else None for v in found]
    return [None] * len(replay.outputs)


def _are_all_moved(moved: Tensor) -> bool:
    """Whether no row stays."""
    return bool(moved.reshape(len(moved), -1).any(1).all())


def _are_alike(moved: Tensor) -> bool:
    """Whether all rows differ by the same."""
    return float((moved - moved[0]).abs().amax()) <= EQUAL * float(moved.abs().amax())


def _alone(moved: Tensor, own: int) -> int | None:
    """The one row that differs, where it is not its own."""
    sizes = moved.flatten(1).abs().amax(1) if moved.ndim > 1 else moved.abs()
    rows = (sizes > STILL * float(sizes.max())).nonzero().flatten().tolist()
    return rows[0] if len(rows) == 1 and rows[0] != own else None
