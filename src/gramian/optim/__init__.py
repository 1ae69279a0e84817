"""Optimisers that see parameters as matrices."""

from gramian.optim.muon import Muon

__all__ = ["Muon"]
