"""The demo on handwritten digits: diagnose, show what fails, repair, train, diagnose again, compress."""

from gramian.demo.steps import run
from gramian.demo.story import CELLS, KEEP, RATES, Story

__all__ = ["CELLS", "KEEP", "RATES", "Story", "run"]
