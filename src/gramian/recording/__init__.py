"""Capture: one streamed pass over the data gives the Gram matrices of every layer."""

from gramian.recording.live import capturing
from gramian.recording.measuring import evaluating, measuring
from gramian.recording.onepass import capture
from gramian.recording.windows import patches

__all__ = ["capture", "capturing", "evaluating", "measuring", "patches"]
