"""Optimisers that see parameters as matrices."""

from gramian.optim.muon import Muon
from gramian.optim.proximal import Proximal

__all__ = ["Muon", "Proximal"]
