"""Which layers keep how many ranks: one budget of parameters for the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gramian.block import blocks
from gramian.calls import as_model, unwrapped
from gramian.compression.files import pretrained_support
from gramian.compression.lowrank import LowRank, matrix_of
from gramian.compression.modules import copied, module_name, replaced, submodule
from gramian.compression.weighted import WeightedSVD, decompose, why_not
from gramian.errors import InputError, some
from gramian.loader import Batches
from gramian.objective import Objective
from gramian.recording import capture
from gramian.statistics import Site, Sites, Statistics

__all__ = ["Plan", "compress"]

DEFAULT_KEEP = 0.5


@dataclass(frozen=True, eq=False)
class Plan:
    """How many ranks each layer keeps at a share `keep` of the model's parameters.

    `plan.at(keep=…)` gives another share without new decompositions; `plan.apply()` gives the smaller model.

    Args:
        model: as it came, dense.
        spectra: the weighted singular value decomposition of each layer that can be factored.
        keep: share of all the model's parameters; where none was asked for, one half, or the smallest that is possible.
        ranks: by layer (the module's name), a rank, or `None` where the layer stays dense.
        reasons: by layer, why it is not factored at any share.
        note: where `keep` is not the default share, why.
    """

    model: nn.Module
    spectra: tuple[WeightedSVD, ...]
    keep: float
    ranks: dict[str, int | None]
    reasons: dict[str, str]
    note: str = ""

    def __str__(self) -> str:
        factored = sum(rank is not None for rank in self.ranks.values())
        text = f"keep = {self.keep:.3f}: {self.parameters:,} of {self.parameters_dense:,} parameters, {factored} layers"
        return f"{text} factored{f' ({self.note})' if self.note else ''}"

    @property
    def parameters_dense(self) -> int:
        """Parameters of the model as it came."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def parameters(self) -> int:
        """Parameters of the model that `apply()` gives."""
        saved = 0
        for s in self.spectra:
            rank = self.ranks[module_name(s.block)]
            saved += 0 if rank is None else s.block.parameter.numel() - s.cost(rank)
        return self.parameters_dense - saved

    @property
    def _smallest(self) -> int:
        """Parameters with rank 1 everywhere."""
        fixed = self.parameters_dense - sum(s.block.parameter.numel() for s in self.spectra)
        return fixed + sum(s.cost(1) for s in self.spectra)

    @property
    def predicted_loss(self) -> float:
        """The increase of the mean loss that the dropped singular values stand for, to second order: `½ Σ σ²`."""
        lost = [s.values[self.ranks[module_name(s.block)] or len(s.values) :].square().sum() for s in self.spectra]
        return 0.5 * float(sum(lost))

    def at(self, *, keep: float) -> Plan:
        """The plan at another share of the model's parameters, `0 < keep ≤ 1`.

        Singular values of all layers stand in one list, by `σ²` for each parameter that they cost, and are taken from
        the top until the budget is spent. Every layer keeps at least rank 1; a layer whose factors would be no smaller
        than itself stays dense.

        Raises:
            InputError: `keep` is out of range, or below what rank 1 everywhere needs.
        """
        if not 0 < keep <= 1:
            raise InputError(f"compress: keep must be a share in (0, 1], got {keep}")
        total, spent = self.parameters_dense, self._smallest
        if spent > keep * total:
            raise InputError(
                f"compress: keep={keep} of {total:,} parameters is {int(keep * total):,}, but rank 1 everywhere needs "
                f"{spent:,}{self._dense()}; the smallest possible keep is {spent / total:.3f}"
            )
        # Beyond its break-even a layer is dense, its further singular values free, taken with the last paid one.
        steps = [range(1, s.break_even) for s in self.spectra]
        worth = torch.cat([
            s.values[1 : s.break_even].cpu().square() / sum(s.shape) for s in self.spectra
        ])  # fmt: skip
        cost = torch.tensor(
            [s.cost(r + 1) - s.cost(r) for s, r_s in zip(self.spectra, steps, strict=True) for r in r_s]
        )
        owner = torch.repeat_interleave(torch.tensor([len(r) for r in steps]))
        # Filled to the first that does not fit, and no further: so a larger budget never takes a rank from a layer.
        order = worth.argsort(descending=True, stable=True)
        taken = int((cost[order].cumsum(0) <= keep * total - spent).sum())
        extra = owner[order[:taken]].bincount(minlength=len(self.spectra)).tolist()
        ranks = {
            module_name(s.block): 1 + r if 1 + r < s.break_even else None
            for s, r in zip(self.spectra, extra, strict=True)
        }
        return replace(self, keep=keep, ranks=ranks, note="")

    def _dense(self) -> str:
        """The layers that are not factored, the first few, for an error."""
        shown = some((f"{name} ({why})" for name, why in self.reasons.items()), separator="; ")
        return f" (not factored: {shown})" if shown else ""

    def apply(self) -> nn.Module:
        """A copy of the model with the planned layers factored. The original is untouched."""
        model = copied(self.model)
        for s in self.spectra:
            name = module_name(s.block)
            rank = self.ranks[name]
            if rank is None:
                continue
            layer = submodule(model, name)
            low = LowRank(layer, rank)
            left, right = s.left[:, :rank], s.right[:rank]
            bias: Any = getattr(layer, "bias", None)
            if bias is not None and s.mean is not None:
                bias = bias + (matrix_of(layer).double() - left @ right) @ s.mean
            low.set_(left, right, bias)
            model = replaced(model, name, low)
        support = pretrained_support()
        if support is not None:
            support.attach(model)
        return model


def compress(
    model: nn.Module,
    stats: Statistics | None = None,
    *,
    batches: Batches | None = None,
    objective: Objective | Callable | None = None,
    keep: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Factors every linear layer and convolution so that the loss grows least for the parameters kept.

    Each layer is cut where its output error, weighted by the loss's curvature, is least: the SVD of `G^½ W A^½`, with A
    the covariance of the layer's inputs (its bias takes up what the mean input loses) and G the second moment of its
    output gradients. So weighted, the squared singular values of all layers are in one unit, the loss, and one budget
    is filled from one list.

    Args:
        model: left untouched.
        stats: from `gm.capture`, best with `fisher="gauss_newton"`; or give `batches` and `objective`.
        batches: as in `gm.capture`, in place of `stats`; they are read once.
        objective: how they are turned into a loss, in place of `stats`.
        keep: share of all the model's parameters to keep. By default 0.5, or where rank 1 everywhere needs more than
            that, the smallest possible share, which the plan's text says.
        progress: called with the number of layers done.

    Returns:
        A plan; `plan.at(keep=0.3).apply()`. A wrapper around the whole model (`torch.compile`, `DataParallel`) is left
        out of it.

    Raises:
        InputError: there are no statistics, they are not finite, or no layer can be factored.

    Cost: two eigendecompositions and one singular value decomposition in float64 for each layer.
    Source: whitening by A: SVD-LLM (2403.07378), §3.1; by both sides: Fisher-weighted SVD (2207.00112) with Kronecker
    factors.

    >>> from torch import nn
    >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)), torch.eye(16)
    >>> plan = compress(net, batches=[(x, x[:, :2])], objective=Objective.regression(), keep=0.6)
    >>> plan.ranks["0"] < 8, plan.parameters <= 0.6 * plan.parameters_dense
    (True, True)
    """
    model = as_model(model, "compress")
    if stats is None:
        if batches is None or objective is None:
            raise InputError("compress: give stats from gm.capture, or both batches= and objective=")
        stats = capture(model, batches, objective)
    model = unwrapped(model)
    spectra: list[WeightedSVD] = []
    reasons: dict[str, str] = {}
    for block in blocks(model).blocks:
        sites = stats.get(block.name) or Sites([Site(reason="not in the statistics")])
        reason = why_not(block, sites)
        if reason:
            reasons[module_name(block)] = reason
            continue
        spectra.append(decompose(block, sites.only))
        if progress is not None:
            progress(len(spectra))
    if not spectra:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise InputError(
            f"compress: no layer of {type(model).__name__} can be factored ({why or 'it has no matrices'})"
        )
    empty: dict[str, int | None] = {module_name(s.block): None for s in spectra}
    plan = Plan(model, tuple(spectra), 1.0, empty, reasons)
    if keep is not None:
        return plan.at(keep=keep)
    smallest = plan._smallest / plan.parameters_dense
    if smallest <= DEFAULT_KEEP:
        return plan.at(keep=DEFAULT_KEEP)
    if smallest >= 1:  # nothing becomes smaller: all stays dense, and `at` says why
        return replace(plan, note="no layer has factors smaller than itself")
    smallest = math.nextafter(smallest, 1.0)  # the budget of `at` is not below it by rounding
    note = f"{smallest:.3f} is the smallest possible share; {DEFAULT_KEEP} is not possible{plan._dense()}"
    return replace(plan.at(keep=smallest), note=note)
