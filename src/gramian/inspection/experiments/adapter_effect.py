"""How much the steps of a few trained parameters move the outputs of a network that is frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gramian.inspection.experiments.replay import Replay
from gramian.inspection.passes.nonfinite_derivatives import gradients_of
from gramian.inspection.passes.step_records import Observed
from gramian.objective import Objective
from gramian.recording.measuring import evaluating, training
from gramian.samples import first_samples
from gramian.seeding import seed_torch

__all__ = ["moved_by_steps"]

# Samples, steps, and their size: Adam's usual first steps, each entry by a small rate.
ENOUGH, STEPS, RATE = 16, 3, 1e-4
# Share of a network's values that is frozen from which on what is trained is an adapter.
FROZEN = 0.5


def moved_by_steps(model: nn.Module, observed: Observed, objective: Objective) -> float | None:
    """By how much outputs change in a step of Adam at 1e-4, as a share of what differs between samples.

    A head that is trained whole, biases and norms would hide adapters without effect: where matrices stand in one
    module with frozen parameters, these alone take the step.

    Args:
        model: of which most is frozen; left as it was.
        observed: of this model; has its batches.
        objective: gives the loss.

    Returns: the share, over three steps along the signs of the gradients; of several outputs the largest; `None` where
        most is trained, or where an output does not differ between samples.
    Raises: what the model raises.
    Cost: nothing where most is trained; else three passes forward and backward of 16 samples, and two forward.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if not trained or frozen <= FROZEN * (frozen + sum(p.numel() for p in trained)) or not observed.needs_gradient:
        return None
    trained = _beside_frozen(model) or trained
    batch = first_samples(observed.batches[0], ENOUGH)
    kept = [p.detach().clone() for p in trained]

    def outputs() -> list[Tensor]:
        with evaluating(model):
            replay = Replay(model, batch, objective)
        return [t.double() for t in replay.outputs if t.ndim and len(t) > 1] if replay.is_known else []

    before = outputs()
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
    if [t.shape for t in before] != [t.shape for t in after]:
        return None
    spreads = [float((t - t.mean(0)).square().mean().sqrt()) for t in before]
    changes = [float((b - a).square().mean().sqrt()) for a, b in zip(before, after, strict=True)]
    shares = [change / spread / STEPS for change, spread in zip(changes, spreads, strict=True) if spread > 0]
    return max(shares) if shares and len(shares) == len(before) else None


def _beside_frozen(model: nn.Module) -> list[nn.Parameter]:
    """Trained matrices of modules, the model itself apart, that also hold frozen parameters."""
    found: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        own = list(module.parameters())
        if name and any(not p.requires_grad for p in own):
            found |= {id(p): p for p in own if p.requires_grad and p.is_floating_point() and p.ndim > 1}
    return list(found.values())
