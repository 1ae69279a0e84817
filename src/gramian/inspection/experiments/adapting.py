"""How much the steps of a few trained parameters move the outputs of a network that is frozen."""

from __future__ import annotations

import torch
from torch import nn

from gramian.batch import first_samples
from gramian.inspection.experiments.replaying import Replay
from gramian.inspection.passes.derivatives import gradients_of
from gramian.inspection.passes.observed import Observed
from gramian.objective import Objective
from gramian.recording.keeping import seed_torch
from gramian.recording.measuring import evaluating, training

__all__ = ["moved_by_steps"]

# Samples, steps, and their size: Adam's usual first steps, each entry by a small rate.
ENOUGH, STEPS, RATE = 16, 3, 1e-4
# Share of a network's values that is frozen from which on what is trained is an adapter.
FROZEN = 0.5


def moved_by_steps(model: nn.Module, observed: Observed, objective: Objective) -> float | None:
    """By how much outputs change in a step of Adam at 1e-4, as a share of what differs between samples.

    Args:
        model: of which most is frozen; left as it was.
        observed: of this model; has its batches.
        objective: gives the loss.

    Returns: the share, over three steps along the signs of the gradients; `None` where most is trained, where an output
        is not one for each sample, or where nothing differs between samples.
    Raises: what the model raises.
    Cost: nothing where most is trained; else three passes forward and backward of 16 samples, and two forward.
    Source: this library's own.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if not trained or frozen <= FROZEN * (frozen + sum(p.numel() for p in trained)) or not observed.needs_gradient:
        return None
    batch = first_samples(observed.batches[0], ENOUGH)
    kept = [p.detach().clone() for p in trained]

    def outputs() -> torch.Tensor | None:
        with evaluating(model):
            return Replay(model, batch, objective).single

    before = outputs()
    if before is None or before.ndim < 2 or len(before) < 2:
        return None
    try:
        with training(model):
            for _ in range(STEPS):
                seed_torch(0)
                with torch.enable_grad():
                    total, units = objective.loss(model, batch)
                    gradients = gradients_of(total / units, trained)
                for p, g in zip(trained, gradients, strict=True):
                    if g is not None:
                        p.data.sub_((g.to_dense() if g.is_sparse else g).sign(), alpha=RATE)
        after = outputs()
    finally:
        for p, value in zip(trained, kept, strict=True):
            p.data.copy_(value)
    spread = float((before - before.mean(0)).double().square().mean().sqrt())
    if after is None or after.shape != before.shape or not spread > 0:
        return None
    return float((after - before).double().square().mean().sqrt()) / spread / STEPS
