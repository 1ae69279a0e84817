"""Optimizers that see parameters as matrices."""

from gramian.optim.muon import Muon
from gramian.optim.named import OPTIMIZERS
from gramian.optim.proximal import Proximal
from gramian.optim.shampoo import Shampoo
from gramian.optim.soap import SOAP
from gramian.optim.whitened import WhitenedMuon

__all__ = ["OPTIMIZERS", "SOAP", "Muon", "Proximal", "Shampoo", "WhitenedMuon"]
