"""A training that goes on in evaluation mode."""

from __future__ import annotations

from torch import nn

from gramian.errors import some
from gramian.report import Finding

__all__ = ["left_in_evaluation"]

_NORMS = nn.modules.batchnorm._BatchNorm
_DROPOUTS = nn.modules.dropout._DropoutNd
SHOWN = 5


def left_in_evaluation(model: nn.Module, step: int) -> list[Finding]:
    """The finding for a step made of a pass in evaluation mode, in a training that began in training mode.

    Args:
        model: that was called.
        step: of the optimizer.

    Returns: it; nothing where no module of the model does anything else in training mode.
    """
    norms = [n for n, m in model.named_modules() if isinstance(m, _NORMS) and m.track_running_stats and not m.training]
    drops = [n for n, m in model.named_modules() if isinstance(m, _DROPOUTS) and m.p > 0 and not m.training]
    if not norms and not drops:
        return []
    does = ["batch norms use stored statistics, and do not update them"] if norms else []
    does += ["dropout does nothing"] if drops else []
    return [
        Finding(
            "norm-evaluation-mode" if norms else "dropout-evaluation",
            "error" if norms else "warning",
            f"From step {step} on, the model is trained in evaluation mode",
            where=some(norms or drops, SHOWN),
            evidence=f"step {step} was made of a pass with training=False, and steps before it were not (exact)",
            cause=f"model.eval() for a validation, and no model.train() after it: {' and '.join(does)}.",
            advice="Call model.train() after each validation.",
        )
    ]
