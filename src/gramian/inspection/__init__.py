"""Inspection: what is wrong with a network, how sure that is, and what to do."""

from gramian.inspection.diagnosis import inspect
from gramian.inspection.spectra import Spectrum, describe

__all__ = ["Spectrum", "describe", "inspect"]
