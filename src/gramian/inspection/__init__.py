"""Inspection: what is wrong with a network, how sure that is, and what to do."""

from gramian.inspection.comparing.adapter import Adapter, extract_lora
from gramian.inspection.comparing.comparison import compare_checkpoints
from gramian.inspection.diagnosis import inspect
from gramian.inspection.live.watch import Watch, watch
from gramian.inspection.weights.quick import describe_quickly
from gramian.inspection.weights.spectra import Spectrum, describe

__all__ = [
    "Adapter",
    "Spectrum",
    "Watch",
    "compare_checkpoints",
    "describe",
    "describe_quickly",
    "extract_lora",
    "inspect",
    "watch",
]
