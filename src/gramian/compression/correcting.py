"""Correction: how much more, or less, a layer's cut moves the loss than its two second moments say.

`G ⊗ A` takes the inputs of a layer and its output gradients for independent. Where the loss pools over tokens it is far
off, and not by the same for all layers: the errors of values add up over tokens, those of attention scores do not. The
gradients of the weight on batches that the statistics have not seen tell the truth for the directions that are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.calls import prepared
from gramian.compression.modules import submodule
from gramian.compression.weighted import WeightedSVD
from gramian.layers import layout_of
from gramian.objective import Objective
from gramian.recording import evaluating

__all__ = ["corrected"]

SAMPLES = 48
"""Gradients, each of a batch with labels drawn from the model's output. A factor is then within a fifth or so."""
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Ranks at which the loss of a cut is compared, as shares of the break-even rank."""


def corrected(
    model: nn.Module, spectra: Sequence[WeightedSVD], batches: Sequence[Any], objective: Objective
) -> tuple[WeightedSVD, ...]:
    """The decompositions with singular values that are scaled, each layer by one factor.

    The factor is `E ⟨∇W, W − L R⟩² / Σ_{j>r} σ_j²`, the geometric mean over some ranks r, with the gradients of losses
    whose labels are drawn from the model's output. Those of different samples are independent, so the mean over batches
    is the Gauss–Newton quadratic form of the cut, with all correlations between tokens.

    Args:
        model: dense; its parameters' gradients stay as they were.
        spectra: of its layers.
        batches: best ones that the statistics have not seen.
        objective: with labels to draw; without, nothing is corrected.

    Returns:
        As many decompositions.

    Raises: nothing of its own.
    Cost: `SAMPLES` backward passes, and as many products of each layer's gradient with its factors.
    Source: the eigenvalues of EKFAC (George et al. 1806.03884, eq. 10), summed over what is cut.
    """
    layers = [submodule(model, s.name) for s in spectra]
    weights = [layer._parameters.get("weight") for layer in layers]
    if objective.sampled is None or not batches or any(w is None for w in weights):
        return tuple(spectra)
    parts = _coefficients(model, spectra, layers, batches, objective)
    return tuple(s.scaled(_factor(s, c)) if c else s for s, c in zip(spectra, parts, strict=True))


def _coefficients(
    model: nn.Module,
    spectra: Sequence[WeightedSVD],
    layers: Sequence[nn.Module],
    batches: Sequence[Any],
    objective: Objective,
) -> list[list[Tensor]]:
    """For each layer and gradient, its product with each of the layer's components, by the square root of the units."""
    weights = [layer.get_parameter("weight") for layer in layers]
    frozen = [w for w in weights if not w.requires_grad]
    generator = torch.Generator(weights[0].device).manual_seed(2)
    found: list[list[Tensor]] = [[] for _ in spectra]
    draws = -(-SAMPLES // len(batches))
    factors = [(s.left.float(), s.right.float()) for s in spectra]
    try:
        for w in frozen:
            w.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for given in batches:
                batch = prepared(model, given)
                output = objective.predict(model, batch)
                _, units = objective.checked(objective.criterion(output, batch))
                for _ in range(draws):
                    loss = torch.stack(list(objective.losses(output, batch, "sampled", generator))).sum()
                    if not loss.requires_grad:
                        continue
                    grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
                    for one, layer, (left, right), grad in zip(found, layers, factors, grads, strict=True):
                        layout = layout_of(layer)
                        assert layout is not None
                        if grad is not None and bool(grad.isfinite().all()):
                            product = left.mT @ layout.split(grad.float())
                            one.append((product * right).sum(1).double() / float(units) ** 0.5)
    finally:
        for w in frozen:
            w.requires_grad_(False)
    return found


def _factor(s: WeightedSVD, coefficients: list[Tensor]) -> float:
    """The geometric mean over ranks of the quadratic form of what is cut, over its Kronecker-factored estimate."""
    each = torch.stack(coefficients)
    cut = each.flip(1).cumsum(1).flip(1).square().mean(0)
    logs = []
    for share in SHARES:
        rank = int(share * s.candidates.top)
        estimate, true = float(s.candidates.losses[rank]), float(cut[rank])
        if estimate > 0 and true > 0:
            logs.append(torch.tensor(true / estimate).log())
    return float(torch.stack(logs).mean().exp()) if logs else 1.0
