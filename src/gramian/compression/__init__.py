"""Compression: by ranks, integers and zeros (`compress`), or by fewer heads, units and channels (`narrow`)."""

from gramian.compression.budget.plan import Plan
from gramian.compression.budget.planning import compress
from gramian.compression.fitting.refitting import refit
from gramian.compression.layers.lowrank import LowRank
from gramian.compression.layers.narrow_attention import NarrowAttention
from gramian.compression.layers.opening import OpenGRU, OpenLSTM, OpenRNN
from gramian.compression.storage.files import load_compressed, save_compressed
from gramian.compression.storage.plans import load_plan, save_plan
from gramian.compression.units.narrowing import NarrowPlan, narrow

__all__ = [
    "LowRank",
    "NarrowAttention",
    "NarrowPlan",
    "OpenGRU",
    "OpenLSTM",
    "OpenRNN",
    "Plan",
    "compress",
    "load_compressed",
    "load_plan",
    "narrow",
    "refit",
    "save_compressed",
    "save_plan",
]
