"""Training: a task, an optimizer, and a budget in steps, epochs or seconds. A killed run resumes exactly."""

from gramian.training.comparing import compare
from gramian.training.healing import Healed, heal
from gramian.training.loop import train
from gramian.training.schedule import NUM_EVALUATIONS, WARMUP_STEPS
from gramian.training.start import INITS
from gramian.training.task import Run, Task

__all__ = ["INITS", "NUM_EVALUATIONS", "WARMUP_STEPS", "Healed", "Run", "Task", "compare", "heal", "train"]
