"""Building: the module that a layer becomes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gramian.compression.budget.mixing import Form
from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.layers.feedback import Feedback
from gramian.compression.layers.lowrank import LowRank, matrix_of
from gramian.compression.layers.pruning import pattern_of, pruned
from gramian.compression.layers.quantized import Quantized
from gramian.compression.layers.rounding import Codes, rounded
from gramian.errors import InputError
from gramian.layers import layout_of

__all__ = ["built", "tied"]


@torch.no_grad()
def built(layer: nn.Module, s: WeightedSVD, form: Form) -> nn.Module:
    """The module that takes a layer's place; its bias takes up what the mean input loses.

    Args:
        layer: as it is.
        s: its decomposition.
        form: not that of a dense layer.

    Returns:
        A factored or quantized layer, or a copy with zeros in its weight.

    Raises:
        InputError: the weight is not finite.

    Cost: for bits and zeros, `m n²` multiplications.
    Source: see `rounded`, `pruned` and `LowRank`.
    """
    w = matrix_of(layer)
    if not bool(w.isfinite().all()):
        raise InputError(f"compress: the weight of {s.name!r} is not finite; gm.inspect finds where NaN begins")
    if form.rank is not None or isinstance(layer, LowRank):
        return _factored(layer, w, s, form)
    if form.bits is not None:
        group = form.columns(w.shape[1])
        codes = rounded(w, form.bits, group, s.feedback)
        return Quantized(layer, form.bits, group).set_(codes, _bias(layer, w - codes.matrix(group), s))
    share = pattern_of(form.zeros) if isinstance(form.zeros, str) else form.zeros
    assert share is not None
    made, layout = copy.deepcopy(layer), layout_of(layer)
    assert layout is not None
    left = pruned(w.float(), share, s.feedback)
    made.get_parameter("weight").copy_(layout.join(left).to(w.dtype))
    bias = _bias(layer, w - left, s)
    if bias is not None:
        made.get_parameter("bias").copy_(bias)
    return made


def tied(layer: nn.Module, made: nn.Module) -> LowRank:
    """What another layer with the same weight becomes: its own two layers, with the same factors.

    Args:
        layer: as it is.
        made: what the first became.
    """
    assert isinstance(made, LowRank)
    return LowRank(layer, made.rank).tie_(made, layer._parameters.get("bias"))


def _bias(layer: nn.Module, lost: Tensor, s: WeightedSVD) -> Tensor | None:
    """The bias with what the mean input loses."""
    bias: Any = getattr(layer, "bias", None)
    return bias if bias is None or s.mean is None else bias + (lost.double() @ s.mean).to(bias.dtype)


def _factored(layer: nn.Module, w: Tensor, s: WeightedSVD, form: Form) -> LowRank:
    rank = len(s.values) if form.rank is None else form.rank
    low = LowRank(layer, rank)
    if form.bits is None:
        left, right = s.left[:, :rank], s.right[:rank]
        low.set_(left, right, _bias(layer, w.double() - left @ right, s))
        return low
    right = s.balanced[1][:rank]
    group = form.columns(right.shape[1])
    first = rounded(right, form.bits, group, replace(s.feedback, outputs=right.new_ones(rank)))
    left, moments = _refitted(w, first.matrix(group), s.feedback)
    order = moments.argsort(descending=True)
    columns = form.columns(rank)
    second = rounded(left, form.bits, columns, Feedback(order, moments[order].rsqrt(), s.feedback.outputs))
    product = second.matrix(columns) @ first.matrix(group)
    codes: list[tuple[Codes, int]] = [(first, group), (second, columns)]
    for i, (one, size) in enumerate(codes):
        low[i] = Quantized(low[i], form.bits, size).set_(one, _bias(layer, w - product, s) if i else None)
    return low


def _refitted(w: Tensor, right: Tensor, feedback: Feedback) -> tuple[Tensor, Tensor]:
    """The left factor that is best beside a right one, and the second moments of what that makes of the inputs."""

    def whitened(a: Tensor) -> Tensor:
        a, factor = a.double()[:, feedback.order], feedback.factor.double()
        if factor.ndim == 1:
            return a / factor
        return torch.linalg.solve_triangular(factor, a, upper=True, left=False)

    y = whitened(right)
    gram = y @ y.mT
    left = whitened(w) @ y.mT @ torch.linalg.pinv(gram, rtol=1e-10, hermitian=True)
    return left, gram.diagonal().clamp_min(1e-12 * gram.diagonal().max()).clamp_min(1e-300)
