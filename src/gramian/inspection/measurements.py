"""The measurements of one network, which the rules read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gramian.inspection.weights.spectra import Spectrum
from gramian.operators import Gain
from gramian.report import Direction, Finding, Layer, Place
from gramian.statistics import Statistics

__all__ = ["Measured"]


@dataclass
class Measured:
    """All measurements of one model.

    Attributes:
        layers, spectra: one of each per matrix, in the same order; those of vectors that are not finite come last.
        dtype: of the parameters.
        stats: second moments of inputs and output gradients; `None` without data, as is all that follows.
        gains: χ of each block by name; `None` where the next layer's input depends on more than this layer.
        jacobian: singular values of the end-to-end Jacobian, largest first.
        waiting: parameters whose gradient is exactly zero until what is zero has made a few steps; `None` where that
            was not tried.
        frozen: parameters that need no gradient, where others do.
        entries: parameters that meet other values entry by entry, and are no matrices whatever their shape.
        is_satisfied: whether the loss is exactly zero, and has another value or a slope with other outputs: there is
            nothing left to learn from the batch, so that gradients are zero.
        opening: parameters that started at zero and have made a few steps, so that little passes them so far.
        has_learned: whether the loss is far below that of an output that is the same for all samples.
        is_chain: whether the last layer depends on the first, as far as was seen: not in two towers.
        varies: whether outputs are known to differ between samples.
        takes_data: names of the layers that take data as they are.
        is_recurrent: whether the first layer is used again and again, as for each step of a sequence.
        buffers: names of the buffers that are no statistics of batches.
        lost_by: what made weights NaN or infinite, as far as it was found.
        unexplained: what to tell where nothing else is.
        copied: prefixes of the names of layers that torch itself makes by copying one (`nn.TransformerEncoder`).
        facts: numbers about the whole model, by label, for the report; rules may add some.
        notes: how things were measured, and what was skipped.
        directions: leading singular vectors of the first layer.
        places: the modules in the order of the forward pass.
        looked_at: what was examined.
        skipped: why something was not examined, by what it is.
    """

    layers: list[Layer] = field(default_factory=list)
    spectra: list[Spectrum] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    stats: Statistics | None = None
    gains: dict[str, Gain | None] = field(default_factory=dict)
    jacobian: tuple[float, ...] = ()
    is_satisfied: bool = False
    opening: frozenset[str] = frozenset()
    has_learned: bool = False
    is_chain: bool = True
    waiting: frozenset[str] | None = None
    frozen: frozenset[str] = frozenset()
    entries: frozenset[str] = frozenset()
    varies: bool = False
    takes_data: frozenset[str] = frozenset()
    is_recurrent: bool = False
    buffers: frozenset[str] = frozenset()
    lost_by: Finding | None = None
    unexplained: Finding | None = None
    copied: tuple[str, ...] = ()
    facts: dict[str, float | int | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    directions: list[Direction] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=lambda: ["weights"])
    skipped: dict[str, str] = field(default_factory=dict)
