"""The whole story on real handwritten digits: diagnose, show what fails, mend, train, diagnose again, compress."""

from gramian.demo.steps import run
from gramian.demo.story import CELLS, KEEP, RATES, Story

__all__ = ["CELLS", "KEEP", "RATES", "Story", "run"]
