"""A cross-entropy that starts far above guessing: what makes the scores so large, where nothing else tells it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.block import Block
from gramian.inspection.causes.context import Context
from gramian.report import Action, Finding

__all__ = ["far_above_guessing"]

# Told from this many times the loss of guessing on, and this far above it.
TIMES, ABOVE = 3.0, 3.0
# rms(W) √fan_in of a head that is large, and scores below which one is masked.
LARGE, MASKED = 2.6, -1e4


@dataclass(frozen=True)
class _Start:
    """Where the loss starts: its mean, that of equal scores, and the scores (N, classes)."""

    loss: float
    guessing: float
    scores: Tensor


def far_above_guessing(context: Context) -> Finding | None:
    """Find a cross-entropy of scores that are so large that it starts at several times the loss of guessing.

    Other causes make it large too; so it is for who has found none.

    Args:
        context: what was seen.

    Returns: a finding about the head, the embedding that is one, or the layer that is unlike the others; or `None`.
    Cost: one evaluation of the loss.
    Source: this library's own; equal scores have the entropy of equal probabilities.
    """
    start = _start(context)
    if start is None or start.loss < max(TIMES * start.guessing, start.guessing + ABOVE):
        return None
    size = float(start.scores.std(-1).mean()) if start.scores.shape[-1] > 1 else float(start.scores.abs().mean())
    told = (
        f"cross-entropy {start.loss:.3g}, {start.guessing:.3g} with equal scores; scores of size {size:.3g}, in which "
        "a sample's classes differ (measured)"
        if start.scores.shape[-1] > 1
        else f"cross-entropy {start.loss:.3g}, {start.guessing:.3g} at a score of 0; scores of size {size:.3g} "
        "(measured)"
    )
    title = f"The loss starts at {start.loss / start.guessing:.2g} times that of guessing: the scores are too large"
    head = _head(context, start.scores.shape[-1])
    is_trained = head is not None and head[0].name in context.trained
    if head is None and not _is_of_batch(context):
        return None
    if head is None or is_trained or head[1] < LARGE:
        name = _largest(context)
        return Finding(
            "head-scale",
            "warning",
            title,
            where=name or (head[0].name if head else "loss"),
            evidence=told,
            cause="The network is sure, and wrong: its scores have grown in training, or it was trained with other "
            "classes."
            if is_trained
            else f"What the head is given is large: {context.told(name)} makes its outputs many times its inputs."
            if name
            else "What the head is given is large.",
            advice="Print a few scores beside their labels."
            if is_trained
            else "Normalize what the head is given, or initialize the layers before it smaller.",
        )
    block, scale = head
    is_table = block.role == "embedding"
    return Finding(
        "embedding-scale" if is_table else "head-scale",
        "error",
        title,
        where=block.name,
        evidence=f"{told}; root mean square of {block.name} × √fan_in = {scale:.3g}",
        cause="Its rows are drawn for an embedding, and as a head they add up over the features."
        if is_table
        else "The head's weights are drawn with a variance that does not fall with the number of its inputs.",
        action=Action("rescale", {"name": block.name, "factor": float(f"{1 / scale:.3g}")}),
    )


def _start(context: Context) -> _Start | None:
    """The loss of the first batch, where it is a cross-entropy of scores and classes."""
    if context.observed.cosines is not None or context.observed.has_cosines:  # which have a scale on purpose
        return None
    for found in context.observed.criteria:
        scores, target = found.given.float(), found.target
        if not bool(scores.isfinite().any()):
            continue
        if found.function in ("cross_entropy", "nll_loss") and not target.is_floating_point() and scores.ndim > 1:
            return _of_classes(scores.movedim(1, -1).flatten(0, -2), target.flatten())
        if found.function == "binary_cross_entropy_with_logits" and scores.shape == target.shape and scores.numel():
            loss = float(F.binary_cross_entropy_with_logits(scores, target.float()))
            return _Start(loss, math.log(2), scores.reshape(-1, 1))
    return _own(context)


def _own(context: Context) -> _Start | None:
    """The same of a loss of one's own that has the value of cross-entropy."""
    output, labels = context.observed.output, context.given_labels[0] if context.given_labels else None
    if output is None or labels is None or labels.is_floating_point() or output.ndim < 2:
        return None
    scores = output.float().flatten(0, -2)
    if len(scores) != labels.numel():
        return None
    found = _of_classes(scores, labels.to(scores.device).flatten())
    return found if found and math.isclose(found.loss, context.observed.first_loss, rel_tol=1e-3) else None


def _of_classes(scores: Tensor, labels: Tensor) -> _Start | None:
    kept = (labels >= 0) & (labels < scores.shape[-1])
    scores, labels = scores[kept], labels[kept]
    if not len(scores) or scores.shape[-1] < 2:
        return None
    seen = float((scores > MASKED).sum(-1).float().mean())
    loss = float(F.cross_entropy(scores, labels))
    return _Start(loss, math.log(max(2.0, seen)), scores) if math.isfinite(loss) else None


def _head(context: Context, num_classes: int) -> tuple[Block, float] | None:
    """The last matrix with a row or column for each class that a product takes, and rms(W) √fan_in."""
    found = None
    for block, w in context.values():
        if block.name not in context.observed.multiplied or w.ndim != 2 or num_classes not in w.shape:
            continue
        rows, columns = w.shape
        fan_in = rows if columns == num_classes and rows != num_classes else columns
        found = block, float(w.float().square().mean().sqrt()) * math.sqrt(fan_in)
    return found


def _largest(context: Context) -> str:
    """The module with parameters that makes its outputs the most times its inputs, from 8 on; empty if none."""
    gains = {c.name: c.output.rms / c.input.rms for c in context.observed.calls if c.input is not None and c.input.rms}
    owners = {context.module_of(name) for name in context.parameters}
    name = max((n for n in gains if n in owners), key=lambda n: gains[n], default="")
    return name if name and gains[name] > 8.0 else ""


def _is_of_batch(context: Context) -> bool:
    """Whether the labels are some of the batch, and not the numbers of samples."""
    labels = [y.flatten().cpu() for y in context.labels]
    return any(
        y.numel() == c.target.numel() and torch.equal(y, c.target.flatten().cpu().to(y.dtype))
        for c in context.observed.criteria
        for y in labels
    )
