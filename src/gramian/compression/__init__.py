"""Compression: by ranks, integers and zeros (`compress`), or by fewer heads, units and channels (`narrow`)."""

from gramian.compression.files import load_compressed, save_compressed
from gramian.compression.lowrank import LowRank
from gramian.compression.narrowing import NarrowPlan, narrow
from gramian.compression.plan import Plan
from gramian.compression.planning import compress
from gramian.compression.plans import load_plan, save_plan
from gramian.compression.refitting import refit

__all__ = [
    "LowRank",
    "NarrowPlan",
    "Plan",
    "compress",
    "load_compressed",
    "load_plan",
    "narrow",
    "refit",
    "save_compressed",
    "save_plan",
]
