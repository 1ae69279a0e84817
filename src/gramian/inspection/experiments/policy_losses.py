"""What the loss of a policy is made of: what each choice is worth, an entropy, and what they give a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.chosen_actions import LEAST, MOST, chosen_and_numbers
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import Given

__all__ = ["Policy", "policy_terms"]

# The share of the gradients that may be left where they are those of a policy; below it numbers are rounding.
LEFT = 1e-3
# The share that may be left of what is to be an entropy's.
MOSTLY = 0.05


@dataclass(frozen=True)
class Policy:
    """The parts of a policy's gradient, with scores drawn at random.

    Attributes:
        choice, reward: the tensors, as Python reads them off a batch.
        shape: of the scores.
        entropy: its factor in the loss; below zero where the loss falls with it.
        worth: the largest number, of the first samples, that a choice's log-probability is multiplied by.
        is_attached: whether these numbers hand on a gradient to an output with one number for each sample.
    """

    choice: str
    reward: str
    shape: tuple[int, ...]
    entropy: float
    worth: float
    is_attached: bool


def policy_terms(asked: Asked) -> Policy | None:
    """Take the gradient of a policy's loss by its scores apart.

    By the scores s of a softmax p, the log-probability of choice a has the gradient onehot(a) − p, and the negative
    entropy p (log p + H). These are fitted to the gradients of the loss, with scores drawn at random, a factor for each
    sample's choice and one for the entropy; they fit all but exactly, or the loss is another one. Clipped ratios,
    baselines and normalized advantages change the first factors alone.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `Policy`, or `None` where the loss is no policy's, or no number of the batch changes what choices are
        worth.
    Raises: what the model raises.
    Cost: three evaluations of the loss and its gradient, of batches with choices and numbers.
    Source: Williams 1992 for the first gradient; this library's own.
    """
    replay = asked.replay
    if not replay.is_known or asked.seen.strangers:
        return None
    chosen, numbers = chosen_and_numbers(asked)
    for i, out in enumerate(replay.outputs):
        if out.ndim != 2 or not 2 < out.shape[1] <= MOST or len(out) < LEAST:
            continue
        scores = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        outputs = [*replay.outputs[:i], scores, *replay.outputs[i + 1 :]]
        for choice in chosen:
            columns = choice.values[0].reshape(-1).long()
            if len(columns) != len(out) or not 0 <= int(columns.min()) <= int(columns.max()) < out.shape[1]:
                continue
            found = _fitted(replay.gradients(outputs)[i], scores, columns)
            if found is None:
                continue
            reward = next((n for n in numbers if _moves(replay, outputs, i, columns, n, found[1])), None)
            if reward is not None:
                entropy, worth = len(out) * found[0], len(out) * float(found[1].abs().amax())
                is_attached = _is_attached(replay, outputs, i, columns)
                return Policy(choice.name, reward.name, tuple(out.shape), entropy, worth, is_attached)
    return None


def _fitted(gradients: Tensor, scores: Tensor, columns: Tensor) -> tuple[float, Tensor] | None:
    """The factor of the negative entropy, and that of each choice's log-probability, up to its sign."""
    g, log_p = gradients.double(), scores.double().log_softmax(1)
    p = log_p.exp()
    own = p - F.one_hot(columns, p.shape[1])
    entropy = p * (log_p - (p * log_p).sum(1, keepdim=True))
    if not bool(g.isfinite().all()) or not bool(g.any()):
        return None

    def along(t: Tensor) -> Tensor:
        return (t * own).sum(1, keepdim=True) / own.square().sum(1, keepdim=True)

    rest, beside = (t - along(t) * own for t in (g, entropy))
    factor = float((rest * beside).sum() / beside.square().sum())
    left = float((rest - factor * beside).norm())
    if left > LEFT * float(g.norm()):
        return None
    factor = factor if left < MOSTLY * float(rest.norm()) else 0.0  # something small, and no entropy
    return factor, along(g - factor * entropy)[:, 0]


def _moves(replay: Replay, outputs: list[Tensor], i: int, columns: Tensor, number: Given, worth: Tensor) -> bool:
    """Whether other samples' numbers change what choices are worth."""
    t = number.values[0]
    batch = mapped(replay.batch, lambda v: v.roll(1, 0) if v is t else v)
    found = _fitted(replay.gradients(outputs, batch)[i], outputs[i], columns)
    return found is not None and float((found[1] - worth).abs().amax()) > LEFT * float(worth.abs().amax())


def _is_attached(replay: Replay, outputs: list[Tensor], i: int, columns: Tensor) -> bool:
    """Whether the gradient by another output holds log-probabilities of the choices, with a derivative by them."""
    free = [t.detach().clone().requires_grad_() for t in outputs]
    others = [t for k, t in enumerate(free) if k != i and t.numel() == len(columns)]
    total = replay.loss(free)
    if not others or not total.requires_grad:
        return False
    found = torch.autograd.grad(total, others, create_graph=True, allow_unused=True)
    generator = torch.Generator().manual_seed(1)
    for g in found:
        if g is None or not g.requires_grad:
            continue
        weights = torch.randn(g.shape, generator=generator).to(g)
        (mixed,) = torch.autograd.grad((g * weights).sum(), free[i], retain_graph=True, allow_unused=True)
        if mixed is not None and (fitted := _fitted(mixed, outputs[i], columns)) is not None:
            return abs(fitted[0]) <= LEFT * float(fitted[1].abs().amax())
    return False
