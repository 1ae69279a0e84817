"""Losses without a minimum: lower far from the targets, or falling faster than the outputs grow."""

from __future__ import annotations

from torch import Tensor

from gramian.inspection.experiments.normalized_outputs import Sphere
from gramian.inspection.experiments.prerequisites import has_negatives
from gramian.inspection.experiments.replay import Asked
from gramian.inspection.passes.loss_inputs import VALUES

__all__ = ["FAR", "NEAR", "falls", "plunges"]

# Distances down the gradient, in sizes of the outputs.
NEAR, FAR = 10.0, 1000.0
# Share of the outputs that may rise to where the loss as a whole falls.
SOME = 0.1


def falls(asked: Asked) -> tuple[float, float, float] | None:
    """The loss at outputs that are far off the targets, in both directions, where it is lower there."""
    found = next((c for c in asked.seen.criteria if c.function in VALUES), None)
    if found is None or not found.target.is_floating_point() or not found.target.numel():
        return None
    replay = asked.replay
    if not replay.is_single:
        return None
    sizes = [float(t.double().square().mean().sqrt()) for t in (found.given, found.target)]
    far = 1e3 * (1.0 + max(sizes))
    below, here, above = (replay.value([replay.outputs[0] + by]) for by in (-far, 0.0, far))
    if not max(below, above) < here - 1e-3 * far:
        return None
    # Where actions are weighted by advantages, some samples fall and others rise.
    rising = replay.gradients([replay.outputs[0] + far])[0] > 0
    return None if float(rising.float().mean()) > SOME or has_negatives(asked) else (below, here, above)


def plunges(asked: Asked) -> tuple[float, float, float] | None:
    """The loss where the outputs are, and two distances down its gradient by one of them, where it falls ever faster.

    That of a critic, or a log-determinant, falls as fast as the output grows; nothing that has a minimum falls faster
    to far below zero.
    """
    replay = asked.replay
    if not replay.is_known or not replay.outputs:
        return None
    for i, (own, gradient) in enumerate(zip(replay.outputs, replay.slopes, strict=True)):
        if not own.numel() or not bool(gradient.isfinite().all()) or not bool(gradient.any()):
            continue
        if own.ndim == 2 and own.shape[1] > 1 and Sphere.of([own]).radius is not None:
            continue  # it cannot grow
        size = 1.0 + float(own.abs().amax())
        step = -gradient * (size / float(gradient.double().norm()))

        def moved(far: float, i: int = i, step: Tensor = step) -> float:
            return replay.value([t + step * far if k == i else t for k, t in enumerate(replay.outputs)])

        start, near, far, ratio = replay.here, moved(NEAR), moved(FAR), FAR / NEAR
        is_far_below = far < -ratio * (1 + abs(start))
        if is_far_below and start - far > 0.3 * ratio**2 * (start - near) > 0:
            outputs = [t + step * FAR if k == i else t for k, t in enumerate(replay.outputs)]
            rises = (replay.gradients(outputs)[i] * step).flatten(1 if own.ndim > 1 else 0)
            rises = rises.sum(1) if own.ndim > 1 else rises
            if float((rises > 0).float().mean()) <= SOME and not has_negatives(asked):
                return start, near, far
    return None
