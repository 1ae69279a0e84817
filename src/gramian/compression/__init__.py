"""Compression by factorization: the spectra of all layers in one list, and one global budget of parameters."""

from gramian.compression.files import load_compressed, save_compressed
from gramian.compression.lowrank import LowRank
from gramian.compression.plan import Plan
from gramian.compression.planning import compress
from gramian.compression.plans import load_plan, save_plan

__all__ = ["LowRank", "Plan", "compress", "load_compressed", "load_plan", "save_compressed", "save_plan"]
