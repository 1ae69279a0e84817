"""Inspection: what is wrong with a network, how sure that is, and what to do."""

from gramian.inspection.adapter import Adapter, extract_lora
from gramian.inspection.comparison import compare_checkpoints
from gramian.inspection.diagnosis import inspect
from gramian.inspection.live import Watch, watch
from gramian.inspection.quick import describe_quickly
from gramian.inspection.spectra import Spectrum, describe

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
