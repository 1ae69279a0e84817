"""What was measured of one network, for the rules to read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gramian.inspection.spectra import Spectrum
from gramian.operators import Gain
from gramian.report import Direction, Layer
from gramian.statistics import Statistics

__all__ = ["Measured"]


@dataclass
class Measured:
    """Everything that was measured of one model: a layer and a spectrum for each matrix, and the signal."""

    layers: list[Layer] = field(default_factory=list)
    spectra: list[Spectrum] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    stats: Statistics | None = None
    gains: dict[str, Gain | None] = field(default_factory=dict)
    jacobian: tuple[float, ...] = ()
    facts: dict[str, float | int | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    directions: list[Direction] = field(default_factory=list)
