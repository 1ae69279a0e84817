"""Gradients of single samples, seen through the components of a layer's decomposition, from one backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import mapped
from gramian.calls import prepared
from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.calibration.reading import cuttable
from gramian.compression.layers.feedback import Feedback
from gramian.compression.layers.lowrank import matrix_of
from gramian.layers import operation_of
from gramian.objective import Objective
from gramian.recording import evaluating
from gramian.recording.hooks import hooks
from gramian.recording.taps import tapped

__all__ = ["Seen", "by_sample", "draws_of", "rounding_ratio", "samples_of"]

PART = 32
"""Samples of one pass."""
ROUNDED = 8
"""Passes that are also asked what rounding costs; each sums over all entries, so few are enough."""
WANTED, MOST_DRAWS = 320, 8
"""Gradients of single samples, and how often labels are drawn for each where there are few samples."""


class Seen:
    """What the gradients of single samples say of one linear layer.

    Each use of the layer adds to its samples' coefficients `Σ_t (g_t L_j) (R_j x_t)`, over the tokens of a sample.

    Args:
        layer: called as a module.
        s: its decomposition.
    """

    def __init__(self, layer: nn.Module, s: WeightedSVD) -> None:
        self.layer, self.feedback = layer, s.feedback
        self.left, self.right = s.left.float(), s.right.float()
        self.mean = None if s.mean is None or getattr(layer, "bias", None) is None else s.mean.float()
        self.rows: list[Tensor] = []
        self.rounds: list[float] = []
        self.fits = True
        self.coefficients: Tensor | None = None
        self.gradient: Tensor | None = None

    def enter(self, x: Tensor, output: Tensor, leaf: Tensor, num: int) -> Tensor:
        """The layer's output, tapped."""
        alike = isinstance(output, Tensor) and x.ndim > 1 and x.shape[:-1] == output.shape[:-1]
        if not alike or x.shape[0] != num or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            self.fits = False
            return output
        inputs = x.detach().float()
        inputs = inputs.clone() if self.mean is None else inputs - self.mean  # which others may change in place
        inner = inputs @ self.right.mT

        def add(gradient: Tensor) -> None:
            gradient = gradient.float()
            each = ((gradient @ self.left) * inner).reshape(num, -1, inner.shape[-1]).sum(1)
            self.coefficients = each if self.coefficients is None else self.coefficients + each
            if len(self.rounds) < ROUNDED and self.feedback.known:
                summed = gradient.flatten(0, -2).mT @ inputs.flatten(0, -2)
                self.gradient = summed if self.gradient is None else self.gradient + summed

        return tapped(output, leaf, add)

    def close(self, units: float) -> None:
        """Ends a backward pass."""
        if self.coefficients is not None and bool(self.coefficients.isfinite().all()):
            self.rows.append(self.coefficients.double() * (len(self.coefficients) / units) ** 0.5)
            if self.gradient is not None:
                self.rounds.append(rounding_ratio(self.feedback, self.gradient, matrix_of(self.layer)) / units)
        self.coefficients = self.gradient = None


def by_sample(
    model: nn.Module,
    spectra: Sequence[WeightedSVD],
    layers: Sequence[nn.Module],
    parts: Iterable[tuple[Any, int]],
    draws: int,
    objective: Objective,
) -> list[Seen | None]:
    """For each layer what gradients of single samples say, with labels drawn from the model's output.

    Samples do not see each other, so each gives an independent term of the Gauss–Newton quadratic form, where the
    gradient of a batch gives one for all.

    Args:
        model: dense, in any mode.
        spectra: of its layers.
        layers: as many.
        parts: as from `samples_of`, read once.
        draws: how often labels are drawn for each sample, as from `draws_of`; 0 where there are none.
        objective: with labels to draw.

    Returns:
        For a layer that is not linear, not called as a module, shared, or called with other rows than samples have,
        `None`.

    Cost: a forward pass and few backward passes of some 320 samples, without gradients of weights, and two products of
    each layer's rows with its factors.
    Source: per-sample gradients of linear layers as outer products (Goodfellow 1510.01799).
    """
    found = [
        Seen(layer, s) if operation_of(layer).factors == "linear" and not s.tied and not s.table else None
        for s, layer in zip(spectra, layers, strict=True)
    ]
    if not draws or not any(found):
        return [None] * len(found)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(2)
    for given, num in parts:
        with evaluating(model), torch.enable_grad():
            _pass(model, found, layers, (given, num), objective, generator, draws)
    return [seen if seen is not None and seen.fits and seen.rows else None for seen in found]


def _pass(
    model: nn.Module,
    found: Sequence[Seen | None],
    layers: Sequence[nn.Module],
    part: tuple[Any, int],
    objective: Objective,
    generator: torch.Generator,
    draws: int,
) -> None:
    given, num = part
    leaf = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)
    pairs = zip(found, layers, strict=True)
    handles, live = [], [(seen, layer) for seen, layer in pairs if seen is not None and seen.fits]
    for seen, layer in live:
        hook = lambda module, args, output, seen=seen: seen.enter(args[0], output, leaf, num)  # noqa: E731
        handles.append(layer.register_forward_hook(hook))
    with hooks(handles):
        batch = prepared(model, given)
        output = objective.predict(model, batch)
    _, units = objective.checked(objective.criterion(output, batch), empty=True)
    for more in reversed(range(draws if units > 0 else 0)):
        loss = torch.stack(list(objective.losses(output, batch, "sampled", generator))).sum()
        if loss.requires_grad:
            torch.autograd.grad(loss, leaf, retain_graph=more > 0, allow_unused=True)
        for seen, _ in live:
            seen.close(float(units))


def draws_of(parts: Sequence[tuple[Any, int]]) -> int:
    """How often labels are drawn for each sample; 0 where there is none.

    Args:
        parts: as from `samples_of`.
    """
    return min(MOST_DRAWS, max(1, round(WANTED / sum(num for _, num in parts)))) if parts else 0


def samples_of(batches: Sequence[Any], most: int = PART) -> Iterator[tuple[Any, int]]:
    """Up to WANTED samples, spread over the batches, with their number in each part.

    Args:
        batches: any; those that cannot be cut into samples are left out.
        most: samples of a part.
    """
    counts = [cuttable(batch) for batch in batches]
    share = min(1.0, WANTED / max(1, sum(counts)))
    for batch, num in zip(batches, counts, strict=True):
        for begin in range(0, round(num * share) if share < 1 else num, most):
            end = min(begin + most, num)
            yield mapped(batch, lambda t, at=slice(begin, end): t[at]), end - begin


def rounding_ratio(feedback: Feedback, gradient: Tensor, w: Tensor) -> float:
    """The quadratic form of one gradient for errors of rounding, over its Kronecker-factored estimate.

    The errors are `N D⁻¹ U`: independent entries in N, whose size is that of the row's scale, and D the diagonal of U.
    """
    ordered, scale = gradient[:, feedback.order], w.float().abs().amax(1).square()
    squares = (ordered * feedback.factor if feedback.factor.ndim == 1 else ordered @ feedback.factor.mT).square()
    costs = feedback.diagonal.double().square().reciprocal()
    estimate = float((scale.double() * feedback.outputs).sum() * costs.double().sum())
    ratio = float((scale @ squares).double() @ costs.double()) / estimate if estimate > 0 else 1.0
    return ratio if math.isfinite(ratio) else 1.0  # squares of huge gradients overflow
