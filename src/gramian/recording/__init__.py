"""Capture: the second moments of every layer's inputs and output gradients, in one pass over the data."""

from gramian.recording.live import capturing
from gramian.recording.measuring import evaluating, measuring
from gramian.recording.onepass import capture
from gramian.recording.windows import patches

__all__ = ["capture", "capturing", "evaluating", "measuring", "patches"]
