"""Optimism: what of a rise on training data is there because the model was trained on their labels.

Where the loss has curvature h, training from zero goes the share 1 − e of the way to the training data's optimum, which
is w + n: what all data share, and the noise of N samples. What is left of the training gradient is −h e (w + n), and
of that on new data h ((1 − e) n − e w). Cutting the direction costs the divergence ½ h (1 − e)² (w + n)²; the labels
add h e (1 − e) (w + n)² on training data, and h (1 − e) (w + n) (e w − (1 − e) n) on new data. So if a share s of the
optimum is noise, n² = s (w² + n²) in expectation, labels add 1 − s / e times as much on new data. The rise tells e: it
is labels / (labels + 2 divergence). Gradients tell s: products of those of different folds of the training data, whose
own noise is not the same, have the mean h² (e² w² − (1 − e²) n²), which is 1 − s / e² of the whole gradient's square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gramian.batch import num_samples
from gramian.calls import prepared
from gramian.compression.calibration.measure import Measure
from gramian.compression.layers.lowrank import matrix_of
from gramian.compression.layers.modules import submodule
from gramian.layers import layout_of
from gramian.recording import evaluating

__all__ = ["Kept", "kept_on_new_data"]

FOLDS = 8
"""As many gradients of the factored layers are in memory at once."""
FOLDED_BYTES = 2**30
"""What these may take where the number of samples that the model was trained on is not said, but assumed."""
TAIL = 0.05
"""Of an interval of nine in ten, on either side."""
STUDENT = 1.895
"""The 95 % quantile of Student's t with FOLDS - 1 degrees of freedom."""


class Kept(NamedTuple):
    """The share of the training gradient's square that the gradients of different folds agree on, along what is cut.

    Attributes:
        share: at most about 1; negative where the model knows its training data by heart.
        error: half the interval of 90 %.
        assumed: whether the number of samples that the model was trained on was not said.
    """

    share: float
    error: float
    assumed: bool = False

    def added(self, labels: float, divergence: float) -> tuple[float, float, float]:
        """What labels add to a rise on new data, between the least and the most that it may be in nine of ten cases.

        The noise is that of all directions in which layers lose something. What a cut takes may have another share of
        it, of which only the mean is known: Markov's inequality bounds it. Nor is e that of every direction; noise lies
        where curvature is small, so that its e is between that of the whole cut and 1. The middle is taken, and for the
        interval the worst of these.

        Args:
            labels: what they add on training data; where that is not positive, nothing follows from it.
            divergence: the part of the rise that does not depend on labels.
        """
        if labels <= 0:
            return labels, labels, labels
        left = labels / (labels + 2 * max(divergence, 0.0))
        middle = (1 + left) / 2
        rise = labels * (1 - _noise(middle, self.share) / middle)
        most = max(1 - self.share + self.error, 1e-12)
        worst = min(max(math.sqrt(TAIL / most), left), 1.0)
        low = labels * (1 - min(worst**2 * most / TAIL, 1.0) / worst)
        high = labels * (1 - max(1 - (1 - _noise(left, self.share + self.error)) / TAIL, 0.0))
        return min(low, rise), rise, max(high, rise)


def _noise(e: float, share: float) -> float:
    """The share of noise in the training optimum, where training has left e of the way."""
    return min(max(e * e * (1 - share), 0.0), 1.0)


def kept_on_new_data(plans: Sequence[Any], measure: Measure) -> list[Kept | None]:
    """How far the gradients of different folds of training data agree, along what each plan cuts.

    Args:
        plans: of ranks, of one model.
        measure: batches that the model was trained on, and how many samples there were in all, or are assumed to be.

    Returns:
        For each plan `⟨Qg, Qg'⟩ / (⟨Qg, Qg'⟩ + tr(QΣ)/N)`, with the gradients g and g' of different folds along what is
        cut and the covariance Σ of single samples', and a jackknife interval; `None` where there are fewer than FOLDS
        batches, no layer is cut whose weight is a parameter, or N is assumed and the gradients are too large for that.

    Raises: as the objective.
    Cost: a backward pass of each batch, and FOLDS gradients in memory; for each plan two QR decompositions for each
    layer, and two products for each fold.
    Source: this library's own; `Kept.added` is then the optimism of AIC and TIC (Takeuchi 1976) along what is cut, with
    the response of a training that has not converged, which the rise itself tells.
    """
    batches = [*measure.batches, *measure.more]
    if len(batches) < FOLDS or measure.trained_on is None or not plans:
        return [None] * len(plans)
    model = plans[0].model
    layers = {s.name: submodule(model, s.name) for s in plans[0].spectra}
    layers = {name: layer for name, layer in layers.items() if layer._parameters.get("weight") is not None}
    numel = sum(layer.get_parameter("weight").numel() for layer in layers.values())
    if measure.assumed and 4 * FOLDS * numel > FOLDED_BYTES:
        return [None] * len(plans)
    folds = [batches[i::FOLDS] for i in range(FOLDS)]
    gradients = [_gradient(model, layers, fold, measure) for fold in folds]
    sizes = [sum(num_samples(batch) for batch in fold) for fold in folds]
    return [_kept(_along(plan, gradients), sizes, measure) for plan in plans]


def _kept(along: Tensor | None, sizes: Sequence[int], measure: Measure) -> Kept | None:
    num = measure.trained_on
    if along is None or num is None:
        return None
    products = (along @ along.mT).double()
    whole, *others = (_share(products, sizes, [i for i in range(FOLDS) if i != left], num) for left in range(-1, FOLDS))
    mean = sum(others) / FOLDS
    error = STUDENT * math.sqrt((FOLDS - 1) / FOLDS * sum((one - mean) ** 2 for one in others))
    return Kept(whole, error, measure.assumed) if math.isfinite(whole + error) else None


def _share(products: Tensor, sizes: Sequence[int], chosen: Sequence[int], num: int) -> float:
    """From the products of the folds' mean gradients, some of them."""
    inner = products[chosen][:, chosen]
    k = len(chosen)
    signal = float(inner.sum() - inner.diagonal().sum()) / (k * (k - 1))
    each = sum((float(inner[i, i]) - signal) * sizes[fold] for i, fold in enumerate(chosen)) / k
    whole = signal + each / num  # what the gradient of all training data has
    return signal / whole if whole > 0 else math.nan


def _along(plan: Any, gradients: Sequence[dict[str, Tensor]]) -> Tensor | None:
    """Gradients along the outputs and the inputs where layers lose something, each as one vector: (folds, numbers).

    Of a layer's longer side these are as many as the shorter one has, chosen by what the layer has learned, noise
    included: of a layer that has learned nothing else, the share is then found too large. With all of that side's other
    directions, most of them some along which the layer has nothing, that of trained networks came out far too small.
    """
    found = []
    for s in plan.spectra:
        rank = plan.forms[s.name].rank
        if rank is not None and s.name in gradients[0]:
            left, right = (torch.linalg.qr(side).Q for side in (s.left[:, rank:].float(), s.right[rank:].mT.float()))
            found.append(torch.stack([(left.mT @ each[s.name] @ right).flatten() for each in gradients]))
    return torch.cat(found, 1) if found else None


def _gradient(
    model: nn.Module, layers: dict[str, nn.Module], batches: Sequence[Any], measure: Measure
) -> dict[str, Tensor]:
    """The mean gradient of some batches by each layer's matrix."""
    weights = [layer.get_parameter("weight") for layer in layers.values()]
    frozen = [weight for weight in weights if not weight.requires_grad]
    sums = {name: torch.zeros_like(matrix_of(layer), dtype=torch.float32) for name, layer in layers.items()}
    total = 0.0
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for batch in batches:
                loss, units = measure.objective.loss(model, prepared(model, batch), empty=True)
                total += float(units)
                grads = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else ()
                for (name, layer), grad in zip(layers.items(), grads, strict=False):
                    layout = layout_of(layer)
                    if grad is not None and layout is not None:
                        grad = grad.to_dense() if grad.is_sparse else grad
                        sums[name] += layout.split(grad.float()).reshape(sums[name].shape)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return {name: one / max(total, 1e-300) for name, one in sums.items()}
