"""`capture`: the second moments of every layer in one pass over the data. The model is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gramian import placement
from gramian.batch import tensors
from gramian.block import Blocks, blocks
from gramian.calls import as_model, prepared
from gramian.errors import DtypeError
from gramian.loader import Batches, as_batches, no_batches
from gramian.objective import Fisher, Objective, as_objective
from gramian.recording.collective import collective_of
from gramian.recording.forward_failures import naming_the_layer
from gramian.recording.measuring import measuring
from gramian.recording.recorder import MAX_DIM, Recorder
from gramian.recording.taps import Pass
from gramian.statistics import Statistics

__all__ = ["capture", "captured"]


def capture(
    model: nn.Module,
    batches: Batches,
    objective: Objective | Callable,
    *,
    layouts: Mapping[str, Any] | None = None,
    fisher: Fisher | None = None,
    generator: torch.Generator | None = None,
    max_dim: int = MAX_DIM,
    precision: Literal["float32", "bfloat16"] = "float32",
    non_finite: Literal["raise", "keep"] = "raise",
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """The second moments of every layer's inputs (A) and output gradients (G), in one pass over the batches.

    `A = (1/rows) Σ a aᵀ` over the rows that enter the layer (samples, tokens, patches of a convolution);
    `G = (1/units) Σ g gᵀ` over the gradients, at the layer's output, of the sum of losses. Both come with means.

    Every product of a parameter with rows is seen: in torch's modules (attention and recurrence run unfused) and in
    functions that the model calls itself, `linear`, `matmul`, `einsum`, `conv`, `embedding`. Other uses have `None` and
    the reason. Where all samples share a row (an embedding of positions), its gradient is their sum.

    Args:
        model: captured in evaluation mode, and left as it was: mode, gradients, buffers, hooks, random state. Under
            DDP or FSDP2 all ranks call this together, each with its own batches, as many as it has. Each gets the
            statistics of all batches, and an error on one rank is raised on all.
        batches: a `DataLoader`, a list or another iterable of batches, which is read once. See docs/objectives.md.
        objective: `gm.Objective`, or a plain `loss(model, batch) -> scalar mean` (then `fisher="empirical"`).
        layouts: as in `gm.blocks`: which matrices a tensor holds, where the class of its module does not tell.
        fisher: which second moment G is, see `gm.Objective`; by default the objective's.
        generator: draws the labels of `fisher="sampled"`; by default one seeded with 0 (with several ranks: the rank).
        max_dim: sides wider than this (a vocabulary) have a `DiagonalGram`.
        precision: "bfloat16" halves the time of the products of rows of linear layers, from 256 features on, on
            processors with such units. Each entry of M is then within 2⁻⁷ √(M_ii M_jj).
        non_finite: whether a loss that is not finite raises, or is captured as it is, for a diagnosis.
        progress: called after each batch with the number of batches done.

    Returns:
        The sites of every block: `stats["0.weight"].A`, `.G`. A site is a use of a weight. A head tied to an embedding
        is a second site of one block; a layer that is applied several times, or a recurrent matrix at its steps, is one
        site with all its rows.

    Raises:
        InputError: no batches (under FSDP2: on any rank), a loss that is not a scalar with units, or a `fisher` that
            the objective lacks.
        DtypeError: a loss that is not finite.
        UnsupportedError: the model is sharded, but not by `fully_shard` over ranks with batches of their own.
    Cost: forward passes; a backward pass for each loss (gauss_newton: one for each output dimension) without gradients
    of weights; and `rows·d²` for each Gram. Memory: the forward pass's, the Grams, and one layer's rows. Accuracy: rows
    are multiplied in float32 and summed over batches in float64.
    Source: A and G as in K-FAC (Martens & Grosse 1503.05671, eq. 1); shared weights as "expand" (2311.00636, §3).

    >>> model, batches = nn.Linear(3, 2), [(torch.ones(4, 3), torch.zeros(4, 2))]
    >>> stats = capture(model, batches, Objective.regression())
    >>> stats["weight"].A, stats["weight"].G
    (Gram(dim=3, count=4), Gram(dim=2, count=4))
    """
    options = {"layouts": layouts, "generator": generator, "max_dim": max_dim, "precision": precision}
    return captured(model, batches, objective, fisher, non_finite, progress, **options)


def captured(
    model: nn.Module,
    batches: Any,
    objective: Any,
    fisher: Fisher | None = None,
    non_finite: Literal["raise", "keep"] = "raise",
    progress: Callable[[int], None] | None = None,
    *,
    layouts: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    max_dim: int = MAX_DIM,
    precision: Literal["float32", "bfloat16"] = "float32",
    differentiates: Callable[[Statistics], bool] | None = None,
    asked: Collection[str] | None = None,
    onward: Callable[[Any, list[Tensor]], None] | None = None,
) -> Statistics:
    """`capture` of some blocks, where batches may add to A alone, and the gradients of the inputs can be had.

    Args:
        model, batches, objective, fisher, non_finite, progress: as in `capture`.
        layouts, generator, max_dim, precision: as in `capture`.
        differentiates: called before each batch with the statistics so far, whether the batch adds to G too. One that
            does not has no backward pass, and its units do not count. Not with several ranks.
        asked: the names of the blocks that are captured; by default all.
        onward: called after each batch with it and the gradients of each loss with respect to those of the batch's
            tensors that require one, stacked along a first dimension: what a part of a model hands on.

    Raises: as `capture`.
    """
    model, objective = as_model(model, "capture"), as_objective(objective)
    mode: Fisher = fisher or objective.fisher
    ranks = collective_of(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # Each rank draws its own labels.
    seed = placement.world(ranks.group).rank if ranks.together else 0
    generator = generator or torch.Generator(device).manual_seed(seed)
    stats = Statistics(fisher=mode)
    found = blocks(model, layouts)
    if asked is not None:
        found = Blocks(tuple(block for block in found.blocks if block.name in asked), found.rest)
    recorder = Recorder(found, stats, max_dim=max_dim, precision=precision)
    total_loss, num_batches = 0.0, 0
    with ranks.agreed_pass(), measuring(model), ranks.resharded(), recorder.installed():
        for given, counts in ranks.steps(as_batches(batches, "capture")):
            with torch.set_grad_enabled(differentiates is None or differentiates(stats)):
                batch = prepared(ranks.model, given)
                recorder.begin(Pass(factor=1.0, dummy=not counts), objective.mask(batch))
                with nullcontext() if ranks.together else naming_the_layer("capture", batch, objective, ranks.model):
                    output = objective.predict(ranks.model, batch)
                recorder.end()
                if not torch.is_grad_enabled():
                    num_batches += 1
                    continue
                with ranks.agreed_loss():
                    loss, units = objective.checked(objective.criterion(output, batch))
                    if non_finite == "raise" and not loss.isfinite():
                        raise DtypeError(
                            f"capture: the loss of batch {num_batches} is {loss.item()}; repair the model first "
                            "(gm.inspect names the first layer that is not finite), or pass non_finite='keep'"
                        )
                    losses = list(objective.losses(output, batch, mode, generator))
                inputs = [t for t in tensors(batch) if t.requires_grad] if onward is not None else []
                grads = differentiate(recorder, losses, inputs=inputs)
                if onward is not None:
                    onward(batch, [torch.stack(each) for each in zip(*grads, strict=True)])
                if counts:
                    stats.units += float(units)
                    total_loss += float(loss.detach())
            del output, loss, losses
            num_batches += 1
            if counts and progress is not None:
                progress(num_batches)
    stats.loss = total_loss / stats.units if stats.units else float("nan")
    recorder.finish()
    if ranks.together:
        stats.all_reduce(ranks.group)
    if not stats.units:
        raise no_batches(batches, "capture")
    return stats


def differentiate(
    recorder: Recorder, losses: list[Tensor], *, retain: bool = False, inputs: Sequence[Tensor] = ()
) -> list[list[Tensor]]:
    """Backward passes that reach the recorder's taps only, and compute no gradient of a weight.

    Returns:
        For each loss the gradients of `inputs`.
    """
    found = []
    for i, loss in enumerate(losses):
        if loss.requires_grad:
            last = i + 1 == len(losses) and not retain
            asked = (recorder.leaf, *inputs)
            _, *grads = torch.autograd.grad(loss, asked, retain_graph=not last, allow_unused=True)
            found.append([torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)])
    return found
