"""What the tests of training runs share: pulling the plug at a step, and the weights that are left."""

from __future__ import annotations

from torch import Tensor

import gramian as gm


class Stop(BaseException):
    """Somebody pulled the plug."""


def stopping(step: int):
    def on_step(run: gm.Run, share: float) -> None:
        if run.steps == step:
            raise Stop

    return on_step


def weights(run: gm.Run) -> list[Tensor]:
    return [t.clone() for t in run.model.state_dict().values()]
