"""A training that goes on in evaluation mode."""

from __future__ import annotations

from torch import nn

from gramian.errors import some
from gramian.report import Finding

__all__ = ["left_in_evaluation"]

_NORMS = nn.modules.batchnorm._BatchNorm
_DROPOUTS = nn.modules.dropout._DropoutNd
SHOWN = 5


def left_in_evaluation(model: nn.Module, step: int, *, has_trained: bool = True) -> list[Finding]:
    """The finding for a step made of a pass in evaluation mode, where that is not meant.

    A training that began in training mode was left there by a validation. One that began so may be meant, as a
    fine-tune with the statistics that were loaded; not where batch norms still have those they were made with.

    Args:
        model: that was called.
        step: of the optimizer.
        has_trained: whether a pass in training mode was made before.

    Returns: it; nothing where no module of the model does anything else in training mode.
    """
    if not has_trained:
        return _never_trained(model, step)
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


def _never_trained(model: nn.Module, step: int) -> list[Finding]:
    norms = [n for n, m in model.named_modules() if isinstance(m, _NORMS) and not m.training and _is_untouched(m)]
    if not norms:
        return []
    return [
        Finding(
            "norm-evaluation-mode",
            "error",
            "The model is trained in evaluation mode, and its batch norms have no statistics of any data",
            where=some(norms, SHOWN),
            evidence=f"all passes until step {step} had training=False; the stored means are 0 and the variances 1, as "
            "the norms were made (exact)",
            cause="model.eval() before the loop, for a first validation perhaps, and no model.train() after it: these "
            "norms do not normalize.",
            advice="Call model.train() before the first step, and after each validation.",
        )
    ]


def _is_untouched(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and not bool(mean.any()) and bool((variance == 1).all())
