"""Correction: how much more, or less, a layer's cut moves the loss than its two second moments say.

`G ⊗ A` takes the inputs of a layer and its output gradients for independent. Where the loss pools over tokens it is far
off, and not by the same for all layers: the errors of values add up over tokens, those of attention scores do not. The
gradients of the weight on batches that the statistics have not seen tell the truth for the directions that are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import mapped
from gramian.calls import prepared
from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.calibration.reading import cuttable
from gramian.compression.calibration.samplewise import by_sample, draws_of, rounding_ratio, samples_of
from gramian.compression.layers.lowrank import matrix_of
from gramian.compression.layers.modules import submodule
from gramian.layers import layout_of
from gramian.objective import Objective
from gramian.recording import evaluating

__all__ = ["corrected", "corrected_by", "parts_of"]

SAMPLES = 48
"""Gradients, each of a batch with labels drawn from the model's output. A factor is then within a fifth or so."""
PART = 4
"""Samples of such a batch. Gradients of samples are independent, so more of them in one make a factor no surer."""
ROUNDED = 4
"""One gradient of so many is also asked what rounding costs; each sums over all entries, so few are enough."""
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Ranks at which the loss of a cut is compared, as shares of the break-even rank."""


def corrected(
    model: nn.Module, spectra: Sequence[WeightedSVD], batches: Sequence[Any], objective: Objective
) -> tuple[WeightedSVD, ...]:
    """The decompositions with singular values that are scaled, each layer by one factor.

    The factor is `E ⟨∇W, W − L R⟩² / Σ_{j>r} σ_j²`, the geometric mean over some ranks r, with the gradients of losses
    whose labels are drawn from the model's output. Those of different samples are independent, so the mean over samples
    is the Gauss–Newton quadratic form of the cut, with all correlations between tokens. A linear layer that is called
    as a module shows each sample's gradient; of others there is one for each small batch.

    Args:
        model: dense; its parameters' gradients stay as they were.
        spectra: of its layers.
        batches: best ones that the statistics have not seen.
        objective: with labels to draw; without, nothing is corrected.

    Returns:
        As many decompositions. What rounding and zeros cost is scaled by a factor of its own.

    Cost: that of `by_sample`; and where not all layers are linear, `SAMPLES` backward passes, and as many products of
    each other layer's gradient with its factors.
    Source: the eigenvalues of EKFAC (George et al. 1806.03884, eq. 10), summed over what is cut.
    """
    if objective.sampled is None or not batches:
        return tuple(spectra)
    samples = list(samples_of(batches))
    return corrected_by(model, spectra, samples, draws_of(samples), parts_of(batches), objective)


def corrected_by(
    model: nn.Module,
    spectra: Sequence[WeightedSVD],
    samples: Iterable[tuple[Any, int]],
    draws: int,
    parts: Iterable[tuple[Any, int]],
    objective: Objective,
) -> tuple[WeightedSVD, ...]:
    """`corrected`, by batches that are cut already.

    Args:
        model, spectra, objective: as there.
        samples: as from `samples_of`, read once.
        draws: for each of these.
        parts: as from `parts_of`, for layers that do not show single samples.
    """
    layers = [submodule(model, s.name) for s in spectra]
    if any(layer._parameters.get("weight") is None for layer in layers):
        return tuple(spectra)
    seen = by_sample(model, spectra, layers, samples, draws, objective)
    rest = [i for i, one in enumerate(seen) if one is None]
    of_rest = _coefficients(model, [spectra[i] for i in rest], [layers[i] for i in rest], parts, objective)
    found = [([], []) if one is None else (one.rows, one.rounds) for one in seen]
    for i, one in zip(rest, of_rest, strict=True):
        found[i] = one
    return tuple(
        s.scaled(_factor(s, cuts), sum(rounds) / len(rounds) if rounds else 1.0) if cuts else s
        for s, (cuts, rounds) in zip(spectra, found, strict=True)
    )


def _coefficients(
    model: nn.Module,
    spectra: Sequence[WeightedSVD],
    layers: Sequence[nn.Module],
    parts: Iterable[tuple[Any, int]],
    objective: Objective,
) -> list[tuple[list[Tensor], list[float]]]:
    """For each layer: of gradients, the product with each of its components, by the square root of the units; and of
    some of them, what rounding costs over its Kronecker-factored estimate.
    """
    if not spectra:
        return []
    weights = [layer.get_parameter("weight") for layer in layers]
    biases = [
        None if s.mean is None else layer._parameters.get("bias") for s, layer in zip(spectra, layers, strict=True)
    ]
    asked = [*weights, *(bias for bias in biases if bias is not None)]
    frozen = [parameter for parameter in asked if not parameter.requires_grad]
    generator = torch.Generator(weights[0].device).manual_seed(2)
    found: list[tuple[list[Tensor], list[float]]] = [([], []) for _ in spectra]
    factors = [(s.left.float(), s.right.float()) for s in spectra]
    try:
        for w in frozen:
            w.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for given, draws in parts:
                batch = prepared(model, given)
                output = objective.predict(model, batch)
                _, units = objective.checked(objective.criterion(output, batch), empty=True)
                for more in reversed(range(draws if units > 0 else 0)):
                    loss = torch.stack(list(objective.losses(output, batch, "sampled", generator))).sum()
                    if not loss.requires_grad:
                        continue
                    grads = torch.autograd.grad(loss, asked, retain_graph=more > 0, allow_unused=True)
                    by_bias = dict(zip(map(id, asked), grads, strict=True))
                    rows = zip(found, spectra, layers, factors, biases, grads, strict=False)
                    for (cuts, rounds), s, layer, (left, right), bias, grad in rows:
                        layout = layout_of(layer)
                        assert layout is not None
                        grad = grad.to_dense() if grad is not None and grad.is_sparse else grad
                        if grad is not None:
                            gradient = layout.split(grad.float())
                            moved = by_bias.get(id(bias))
                            if moved is not None and s.mean is not None:  # the bias takes up what the mean input loses
                                gradient = gradient - moved.float()[:, None] * s.mean.float()
                            products = ((left.mT @ gradient) * right).sum(1).double() / float(units) ** 0.5
                            if not bool(products.isfinite().all()):
                                continue
                            cuts.append(products[None])
                            if len(cuts) % ROUNDED == 1 and s.feedback.known:
                                rounds.append(rounding_ratio(s.feedback, gradient, matrix_of(layer)) / float(units))
    finally:
        for w in frozen:
            w.requires_grad_(False)
    return found


def parts_of(batches: Sequence[Any]) -> Iterator[tuple[Any, int]]:
    """Parts of PART samples spread over the batches, at most SAMPLES of them, and how many gradients each gives.

    Args:
        batches: any.
    """
    places = []
    for batch in batches:
        num = cuttable(batch)
        places += [(batch, slice(i, i + PART)) for i in range(0, num, PART)] or [(batch, None)]
    num = min(SAMPLES, len(places))
    for i in range(num):
        batch, place = places[i * len(places) // num]
        part = batch if place is None else mapped(batch, lambda t, at=place: t[at])
        yield part, (i + 1) * SAMPLES // num - i * SAMPLES // num


def _factor(s: WeightedSVD, coefficients: list[Tensor]) -> float:
    """The geometric mean over ranks of the quadratic form of what is cut, over its Kronecker-factored estimate."""
    each = torch.cat(coefficients)
    cut = each.flip(1).cumsum(1).flip(1).square().mean(0)
    logs = []
    for share in SHARES:
        rank = int(share * s.candidates.top)
        estimate, true = float(s.candidates.losses[rank]), float(cut[rank])
        if estimate > 0 and true > 0:
            logs.append(torch.tensor(true / estimate).log())
    return float(torch.stack(logs).mean().exp()) if logs else 1.0
